// safetensors by mmap. Every number of the header is checked against the file before a view is made.
#include "bitcore/io.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "bitcore/base/checks.h"
#include "bitcore/base/float_types-inl.h"

namespace bitcore {
namespace {

using Json = nlohmann::json;

// The format's own limit on the header.
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

struct FileDType {
  const char* name;
  std::uint64_t bytes;
};

constexpr FileDType kFileDTypes[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1},
                                     {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
                                     {"U32", 4},  {"F32", 4}, {"F64", 8}, {"I64", 8},     {"U64", 8}};

std::uint64_t dtype_bytes(const std::string& name, const std::string& tensor, const std::string& path) {
  for (const FileDType& dtype : kFileDTypes) {
    if (name == dtype.name) return dtype.bytes;
  }
  fail(path, ": tensor '", tensor, "' has the unknown dtype '", name, "'");
}

DType engine_dtype(const TensorEntry& entry) {
  const std::string& name = entry.dtype;
  if (name == "F32") return DType::float32;
  if (name == "BF16") return DType::bfloat16;
  if (name == "F16") return DType::float16;
  if (name == "I8") return DType::int8;
  if (name == "U8") return DType::uint8;
  fail(entry.name, " has dtype ", name, ", expected F32, BF16, F16, I8 or U8");
}

// A file mapped read-only.
class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) fail(path, ": cannot be opened: ", std::strerror(errno));
    struct stat status {};
    const bool regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    size_ = regular ? static_cast<std::size_t>(status.st_size) : 0;
    if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    const int error = errno;
    ::close(file);
    if (!regular) fail(path, ": is no regular file");
    if (size_ == 0) fail(path, ": is empty, expected a safetensors file");
    if (data_ == MAP_FAILED) fail(path, ": cannot be mapped: ", std::strerror(error));
  }
  ~Mapping() { ::munmap(data_, size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

std::uint64_t header_length(std::span<const std::byte> file, const std::string& path) {
  if (file.size() < 8) fail(path, ": has ", file.size(), " bytes, a safetensors file has at least 8");
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < 8; ++i) length |= static_cast<std::uint64_t>(file[i]) << (8 * i);
  if (length > kMaxHeaderBytes || length > file.size() - 8) {
    fail(path, ": its header should have ", length, " bytes, but ", file.size() - 8,
         " follow: it is truncated or no safetensors file");
  }
  return length;
}

// Watches a header while it is parsed. Refuses more nesting than a header has, which no later code then has to follow,
// and notes whether an object has two equal keys: JSON would silently keep the last.
class HeaderWatch {
 public:
  explicit HeaderWatch(const std::string& path) : path_(path) {}

  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    constexpr int kMostDepth = 3;  // the header, a tensor, its shape
    if (depth > kMostDepth) fail(path_, ": its header is nested more than ", kMostDepth, " deep");
    if (event == Json::parse_event_t::object_start) keys_.emplace_back();
    if (event == Json::parse_event_t::object_end) keys_.pop_back();
    if (event == Json::parse_event_t::key) found_ |= !keys_.back().insert(parsed.get<std::string>()).second;
    return true;
  }
  bool found_repeated_keys() const { return found_; }

 private:
  const std::string& path_;
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
  bool found_ = false;
};

Json parse_header(std::span<const std::byte> text, const std::string& path) {
  HeaderWatch watch(path);
  const char* begin = reinterpret_cast<const char*>(text.data());
  Json header;
  try {
    header = Json::parse(begin, begin + text.size(), std::ref(watch));
  } catch (const Json::exception& error) {
    fail(path, ": its header is no valid JSON: ", error.what());
  }
  if (!header.is_object()) fail(path, ": its header is no JSON object");
  if (watch.found_repeated_keys()) fail(path, ": its header names something twice");
  return header;
}

std::uint64_t unsigned_number(const Json& value, const std::string& what, const std::string& path) {
  if (!value.is_number_unsigned()) fail(path, ": ", what, " is ", value.dump(), ", expected a number of at least 0");
  return value.get<std::uint64_t>();
}

const Json& member(const Json& object, const char* key, const std::string& tensor, const std::string& path) {
  if (!object.is_object() || !object.contains(key)) fail(path, ": tensor '", tensor, "' has no '", key, "'");
  return object.at(key);
}

TensorEntry read_entry(const std::string& name, const Json& json, std::span<const std::byte> data,
                       const std::string& path) {
  TensorEntry entry;
  entry.name = path + ": tensor '" + name + "'";
  const Json& dtype = member(json, "dtype", name, path);
  if (!dtype.is_string()) fail(path, ": the dtype of tensor '", name, "' is ", dtype.dump(), ", expected a string");
  entry.dtype = dtype.get<std::string>();
  std::uint64_t bytes = dtype_bytes(entry.dtype, name, path);

  const Json& shape = member(json, "shape", name, path);
  if (!shape.is_array()) fail(path, ": the shape of tensor '", name, "' is ", shape.dump(), ", expected a list");
  for (const Json& size : shape) {
    const std::uint64_t extent = unsigned_number(size, "a size of tensor '" + name + "'", path);
    constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (extent > kMost || (extent != 0 && bytes > kMost / extent))
      fail(path, ": the shape of tensor '", name, "' overflows");
    bytes *= extent;
    entry.shape.push_back(static_cast<std::int64_t>(extent));
  }

  const Json& offsets = member(json, "data_offsets", name, path);
  if (!offsets.is_array() || offsets.size() != 2) fail(path, ": data_offsets of tensor '", name, "' are no pair");
  const std::uint64_t begin = unsigned_number(offsets[0], "an offset of tensor '" + name + "'", path);
  const std::uint64_t end = unsigned_number(offsets[1], "an offset of tensor '" + name + "'", path);
  if (begin > end || end > data.size()) {
    fail(path, ": tensor '", name, "' lies at bytes ", begin, " to ", end, ", the file holds ", data.size(),
         ": it is truncated or damaged");
  }
  if (end - begin != bytes) {
    fail(path, ": tensor '", name, "' has ", end - begin, " bytes, its shape and dtype take ", bytes);
  }
  entry.bytes = data.subspan(begin, end - begin);
  return entry;
}

}  // namespace

std::int64_t TensorEntry::numel() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

ConstMatrixView TensorEntry::matrix() const {
  if (shape.size() != 2) fail(name, " has ", shape.size(), " dimensions, expected 2");
  return {bytes.data(), engine_dtype(*this), shape[0], shape[1], shape[1]};
}

ConstVectorView TensorEntry::vector() const {
  if (shape.size() > 1) fail(name, " has ", shape.size(), " dimensions, expected at most 1");
  const DType type = engine_dtype(*this);
  check_floating(type, name.c_str());
  return {bytes.data(), type, numel()};
}

std::vector<float> TensorEntry::floats() const {
  const DType type = engine_dtype(*this);
  check_floating(type, name.c_str());
  std::vector<float> values(static_cast<std::size_t>(numel()));
  widen(bytes.data(), type, numel(), values.data());
  return values;
}

struct SafetensorsFile::Impl {
  explicit Impl(const std::string& file_path) : path(file_path), mapping(std::in_place, file_path) {
    read(mapping->bytes());
  }
  Impl(std::span<const std::byte> file, std::string name) : path(std::move(name)) { read(file); }

  std::string path;
  std::optional<Mapping> mapping;  // none where the caller owns the bytes
  std::map<std::string, TensorEntry, std::less<>> tensors;
  std::map<std::string, std::string, std::less<>> metadata;

  void read(std::span<const std::byte> file) {
    const std::uint64_t length = header_length(file, path);
    const Json header = parse_header(file.subspan(8, length), path);
    const std::span<const std::byte> data = file.subspan(8 + length);
    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") {
        read_metadata(value);
      } else {
        align(tensors.emplace(name, read_entry(name, value, data, path)).first->second);
      }
    }
  }

  void read_metadata(const Json& json) {
    if (!json.is_object()) fail(path, ": __metadata__ is no JSON object");
    for (const auto& [key, text] : json.items()) {
      if (!text.is_string()) fail(path, ": __metadata__ '", key, "' is ", text.dump(), ", expected a string");
      metadata.emplace(key, text.get<std::string>());
    }
  }

  // A file need not align its tensors, but the engine reads whole elements.
  void align(TensorEntry& entry) {
    constexpr std::size_t kWidestElement = 8;
    if (reinterpret_cast<std::uintptr_t>(entry.bytes.data()) % kWidestElement == 0 || entry.bytes.empty()) return;
    copies.emplace_back(entry.bytes.begin(), entry.bytes.end());
    entry.bytes = copies.back();
  }

  std::vector<std::vector<std::byte>> copies;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
SafetensorsFile::SafetensorsFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

SafetensorsFile SafetensorsFile::from_bytes(std::span<const std::byte> bytes, std::string name) {
  return SafetensorsFile(std::make_unique<Impl>(bytes, std::move(name)));
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

bool SafetensorsFile::contains(std::string_view name) const {
  return impl_->tensors.find(name) != impl_->tensors.end();
}

const TensorEntry& SafetensorsFile::tensor(std::string_view name) const {
  const auto found = impl_->tensors.find(name);
  if (found == impl_->tensors.end()) fail(impl_->path, ": has no tensor '", name, "'");
  return found->second;
}

const std::map<std::string, TensorEntry, std::less<>>& SafetensorsFile::tensors() const { return impl_->tensors; }

const std::map<std::string, std::string, std::less<>>& SafetensorsFile::metadata() const { return impl_->metadata; }

}  // namespace bitcore
