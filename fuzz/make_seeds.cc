// Writes valid inputs for the fuzz targets: make_seeds DIRECTORY
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>

#include "fuzz/support.h"
#include "layouts.h"
#include "tiny_model.h"

namespace bitcore::fuzz {
namespace {

namespace fs = std::filesystem;

void write(const fs::path& path, const std::string& bytes) {
  fs::create_directories(path.parent_path());
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  file.close();
  if (!file) throw std::runtime_error(path.string() + " cannot be written");
}

// Every layout of some shapes, whole and as payload only, for every kernel.
void write_qweights(const fs::path& directory) {
  const std::pair<std::int64_t, std::int64_t> shapes[] = {{1, 1}, {3, 17}, {16, 20}, {17, 70}};
  int count = 0;
  for (const auto& [rows, cols] : shapes) {
    const std::vector<std::int8_t> codes = some_codes(rows * cols);
    const std::vector<Layout> layouts = testing::layouts_of(cols);
    for (std::size_t layout = 0; layout < layouts.size(); ++layout) {
      const std::string packed = bytes_of(pack_weights({codes.data(), rows, cols}, layouts[layout]));
      const auto payload = static_cast<std::size_t>(packed_shape(rows, cols, layouts[layout]).payload_bytes());
      for (std::uint8_t mode = 0; mode < kQweightModes; ++mode) {
        std::string input(kQweightFields, '\0');
        input[kMode] = static_cast<char>(mode);
        input[kOutFeatures] = static_cast<char>(rows - 1);
        input[kInFeatures] = static_cast<char>(cols - 1);
        input[kLayout] = static_cast<char>(layout);
        input[kConfig] = static_cast<char>(count);
        input[kKernel] = static_cast<char>(count / 2);
        write(directory / std::to_string(count++), input + (mode == raw ? packed : packed.substr(0, payload)));
      }
    }
  }
}

// The same file without the last space behind its header, so that no tensor is aligned.
std::string unaligned(std::string file) {
  const std::size_t end = file.find_last_of('}') + 1;
  file.erase(end, 1);
  --file[0];
  return file;
}

void write_files(const fs::path& directory) {
  write(directory / "deployed", safetensors(mlp_metadata(), mlp_tensors(true)));
  write(directory / "trainable", safetensors(mlp_metadata(), mlp_tensors(false)));
  write(directory / "scalar", safetensors({}, {{"s", {"BF16", {}, "ab"}}, {"v", {"F16", {2}, "abcd"}}}));
  write(directory / "unaligned", unaligned(safetensors({}, {{"a", {"U8", {1}, "a"}}, {"b", {"F32", {1, 1}, "abcd"}}})));
  write(directory / "empty", safetensors({{"key", "value"}}, {{"e", {"I64", {0, 3}, ""}}, {"f", {"F32", {0, 3}, ""}}}));
}

// As config_fuzzer.cc reads it: which tensors the file has, then a key and a value a line.
void write_configs(const fs::path& directory) {
  for (const char kind : {'0', '1'}) {
    std::string input(1, kind);
    for (const auto& [key, value] : mlp_metadata()) input += key + "=" + value + "\n";
    write(directory / std::string(1, kind), input);
  }
  for (const char* name : {"auto", "2bit", "float32", "per_tensor", "ReferenceKernel", "Int8Kernel"}) {
    write(directory / name, std::string("0name=") + name);
  }
}

// As model_config_fuzzer.cc reads it: a whole config of each architecture, and what replaces keys of one.
void write_model_configs(const fs::path& directory) {
  char base = '0';
  for (const auto& model : bitmodels::testing::tiny_models()) {
    write(directory / model.architecture, bitmodels::testing::config_json(model));
    write(directory / (model.architecture + "-same"), std::string(1, base) + "{}");
    write(directory / (model.architecture + "-linear"),
          base + std::string(R"({"rope_parameters":{"rope_type":"linear","factor":2}})"));
    write(directory / (model.architecture + "-theta"),
          base + std::string(R"({"rope_parameters":{"rope_theta":500000}})"));
    write(directory / (model.architecture + "-quantization"),
          base + std::string(R"({"quantization_config":{"activation_dtype":"float32","modules":{}}})"));
    write(directory / (model.architecture + "-sizes"),
          base + std::string(R"({"num_attention_heads":2,"head_dim":32})"));
    ++base;
  }
  write(directory / "without", R"(0{"head_dim":null,"hidden_act":null,"eos_token_id":7,"mlp_bias":null})");
  write(directory / "yarn", R"(1{"rope_parameters":{"attention_factor":1.5,"beta_fast":16,"beta_slow":2,"mscale":0.7,)"
                            R"("mscale_all_dim":0.7,"truncate":false}})");
  write(directory / "multipliers", R"(3{"embedding_multiplier":3,"logits_scaling":0.5,"attention_multiplier":1})");
}

}  // namespace
}  // namespace bitcore::fuzz

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: make_seeds DIRECTORY\n";
    return 1;
  }
  const std::filesystem::path directory = argv[1];
  bitcore::fuzz::write_qweights(directory / "qweight");
  bitcore::fuzz::write_files(directory / "safetensors");
  bitcore::fuzz::write_configs(directory / "config");
  bitcore::fuzz::write_model_configs(directory / "model_config");
}
