#include "bitmodels/checkpoint.h"

#include <filesystem>
#include <span>

#include "bitcore/base/checks.h"
#include "bitcore/io/json.h"
#include "bitmodels/json_file.h"

namespace bitmodels {
namespace {

using bitcore::fail_file;
using bitcore::Json;
using bitcore::SafetensorsFile;

constexpr const char* kWeights = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr int kIndexDepth = 4;

// The bytes of a file that is not mapped, and the file that views them.
struct InMemory {
  std::string bytes;
  std::unique_ptr<SafetensorsFile> file;
};

std::shared_ptr<const SafetensorsFile> read_into_memory(const std::string& path) {
  auto content = std::make_shared<InMemory>();
  content->bytes = read_file(path);
  const auto bytes = std::as_bytes(std::span(content->bytes));
  content->file = std::make_unique<SafetensorsFile>(SafetensorsFile::from_bytes(bytes, path));
  return {content, content->file.get()};
}

}  // namespace

Checkpoint::Checkpoint(const std::string& directory, bool map) : directory_(directory) {
  const std::filesystem::path folder(directory);
  const std::string index = (folder / kIndex).string();
  std::error_code error;
  if (std::filesystem::exists(index, error)) {
    read_index(directory, index, map);
  } else {
    add((folder / kWeights).string(), map);
  }
}

void Checkpoint::read_index(const std::string& directory, const std::string& index, bool map) {
  const Json json = read_json_file(index, kIndexDepth);
  if (!json.contains("weight_map") || !json["weight_map"].is_object()) fail_file(index, "has no weight_map");
  std::set<std::string> shards;
  for (const auto& [name, shard] : json["weight_map"].items()) {
    const std::string file = shard.is_string() ? shard.get<std::string>() : "";
    if (!file.ends_with(".safetensors") || file.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      fail_file(index, "names the file ", shard.dump(), ", expected a .safetensors file of the directory");
    }
    shards.insert(file);
  }
  for (const std::string& shard : shards) add((std::filesystem::path(directory) / shard).string(), map);
  for (const auto& [name, shard] : json["weight_map"].items()) {
    const auto place = places_.find(name);
    const auto expected = (std::filesystem::path(directory) / shard.get<std::string>()).string();
    if (place == places_.end() || files_[place->second]->path() != expected) {
      fail_file(index, "promises ", name, " in ", shard.get<std::string>(), ", which does not have it");
    }
  }
}

void Checkpoint::add(const std::string& path, bool map) {
  files_.push_back(map ? std::make_shared<const SafetensorsFile>(path) : read_into_memory(path));
  for (const auto& [name, entry] : files_.back()->tensors()) {
    if (!places_.emplace(name, files_.size() - 1).second)
      fail_file(path, "has ", name, ", which another file has, too");
  }
}

const bitcore::TensorEntry& Checkpoint::take(const std::string& name) {
  const bitcore::TensorEntry* entry = find(name);
  if (entry == nullptr) fail_file(directory_, "has no tensor ", name, ", which the model needs");
  taken_.insert(name);
  return *entry;
}

const bitcore::TensorEntry* Checkpoint::find(const std::string& name) const {
  const auto place = places_.find(name);
  return place == places_.end() ? nullptr : &files_[place->second]->tensor(name);
}

std::shared_ptr<const bitcore::SafetensorsFile> Checkpoint::file_of(const std::string& name) const {
  return files_[places_.at(name)];
}

void Checkpoint::require_all_taken() const {
  for (const auto& [name, place] : places_) {
    if (!taken_.contains(name) && find(name)->numel() != 0) {
      fail_file(files_[place]->path(), "has a tensor ", name, ", which the model does not have");
    }
  }
}

}  // namespace bitmodels
