#include "tiny_model.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <stdexcept>
#include <vector>

#include "bitcore/io.h"
#include "bitcore/ops/base.h"

namespace bitmodels::testing {
namespace {

namespace fs = std::filesystem;
using bitcore::BitQuantConfig;
using bitcore::DType;
using bitcore::Granularity;

// Knuth's MMIX generator, of which the high bits are used: the distributions of the standard differ between libraries.
class Integers {
 public:
  /// From `least` to `most`.
  std::int64_t next(std::int64_t least, std::int64_t most) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return least + static_cast<std::int64_t>((state_ >> 33) % static_cast<std::uint64_t>(most - least + 1));
  }

 private:
  std::uint64_t state_ = 42;
};

struct Tensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;
};

template <class T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

class Builder {
 public:
  explicit Builder(const TinyModel& model) : model_(model) {}

  std::map<std::string, Tensor> build() {
    for (std::int64_t i = 0; i < model_.layers; ++i) add_layer(i);
    add_norm("model.norm.weight", model_.hidden);
    add_table("model.embed_tokens", model_.embedding);
    if (!model_.tied) add_table("lm_head", model_.head);
    return std::move(tensors_);
  }

 private:
  void add_layer(std::int64_t index) {
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    const std::int64_t hidden = model_.hidden, inner = model_.inner;
    const std::int64_t queries = model_.heads * model_.head_dim, keys = model_.key_value_heads * model_.head_dim;
    add_norm(prefix + "input_layernorm.weight", hidden);
    add_norm(prefix + "post_attention_layernorm.weight", hidden);
    if (model_.architecture == "qwen3") {
      add_norm(attention + "q_norm.weight", model_.head_dim);
      add_norm(attention + "k_norm.weight", model_.head_dim);
    }
    if (model_.architecture == "bitnet") {
      add_norm(attention + "attn_sub_norm.weight", queries);
      add_norm(mlp + "ffn_sub_norm.weight", inner);
    }
    add_linear(attention + "q_proj", queries, hidden);
    add_linear(attention + "k_proj", keys, hidden);
    add_linear(attention + "v_proj", keys, hidden);
    if (model_.mixed && index == 1) {
      add_floats(attention + "o_proj.weight", "F16", {hidden, queries}, -24, 24, 128);
      add_bias(attention + "o_proj", hidden);
    } else {
      add_linear(attention + "o_proj", hidden, queries);
    }
    add_linear(mlp + "gate_proj", inner, hidden);
    BitQuantConfig other = model_.quant;
    if (model_.mixed && index == 0) other.weight_granularity = Granularity::per_channel;
    add_linear(mlp + "up_proj", inner, hidden, other);
    add_linear(mlp + "down_proj", hidden, inner);
  }

  void add_linear(const std::string& name, std::int64_t rows, std::int64_t cols) {
    add_linear(name, rows, cols, model_.quant);
  }
  void add_linear(const std::string& name, std::int64_t rows, std::int64_t cols, const BitQuantConfig& config) {
    add_ternary(name, rows, cols, config);
    add_bias(name, rows);
  }

  void add_ternary(const std::string& name, std::int64_t rows, std::int64_t cols, const BitQuantConfig& config) {
    std::vector<std::int8_t> codes(static_cast<std::size_t>(rows * cols));
    for (std::int8_t& code : codes) code = static_cast<std::int8_t>(integers_.next(-1, 1));
    const auto layout = bitcore::has_layout(cols, model_.layout) ? model_.layout : bitcore::Layout::two_bit;
    const auto packed = bitcore::pack_weights({codes.data(), rows, cols}, layout);
    tensors_[name + ".qweight"] = {"U8", {rows, static_cast<std::int64_t>(packed.size()) / rows}, bytes_of(packed)};
    std::vector<std::int64_t> shape;
    if (config.weight_granularity == Granularity::per_channel) shape = {rows};
    if (config.weight_granularity == Granularity::per_group) {
      shape = {rows, (cols + config.group_size - 1) / config.group_size};
    }
    const bool groups = config.weight_granularity == Granularity::per_group;
    add_floats(name + ".qweight_scale", groups ? "F16" : "F32", shape, 96, 224, 1024);
  }

  void add_bias(const std::string& name, std::int64_t rows) {
    if (model_.biases) add_floats(name + ".bias", "F32", {rows}, -16, 16, 64);
  }

  void add_norm(const std::string& name, std::int64_t count) { add_floats(name, "F32", {count}, 192, 320, 256); }

  // The floating ones have the values that fit bfloat16.
  void add_table(const std::string& name, Table table) {
    const std::int64_t rows = model_.vocab, cols = model_.hidden;
    if (table == Table::ternary) return add_ternary(name, rows, cols, model_.quant);
    if (table != Table::int8) {
      const char* dtype = table == Table::bfloat16 ? "BF16" : table == Table::float16 ? "F16" : "F32";
      return add_floats(name + ".weight", dtype, {rows, cols}, -127, 127, 256);
    }
    std::vector<std::int8_t> codes(static_cast<std::size_t>(rows * cols));
    for (std::int8_t& code : codes) code = static_cast<std::int8_t>(integers_.next(-127, 127));
    tensors_[name + ".weight"] = {"I8", {rows, cols}, bytes_of(codes)};
    add_floats(name + ".weight_scale", "F32", {rows}, 1, 16, 4096);
  }

  // Fractions of a power of two, which every dtype here holds exactly.
  void add_floats(const std::string& name, const std::string& dtype, std::vector<std::int64_t> shape,
                  std::int64_t least, std::int64_t most, std::int64_t denominator) {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) {
      value = static_cast<float>(integers_.next(least, most)) / static_cast<float>(denominator);
    }
    const DType type = dtype == "F32" ? DType::float32 : dtype == "F16" ? DType::float16 : DType::bfloat16;
    std::vector<std::byte> bytes(values.size() * bitcore::size_of(type));
    bitcore::convert({values.data(), 1, count}, {bytes.data(), type, 1, count, count});
    tensors_[name] = {dtype, std::move(shape), std::move(bytes)};
  }

  const TinyModel& model_;
  Integers integers_;
  std::map<std::string, Tensor> tensors_;
};

std::string rope_json(const TinyModel& model) {
  const std::string begin = R"({"rope_theta": 10000.0, "rope_type": ")" + model.rope + '"';
  const std::string original = R"(, "original_max_position_embeddings": 256)";
  if (model.rope == "linear") return begin + R"(, "factor": 2.0})";
  if (model.rope == "llama3") {
    return begin + original + R"(, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0})";
  }
  if (model.rope == "yarn") return begin + original + R"(, "factor": 4.0})";
  if (model.rope != "longrope") return begin + "}";
  std::string low, high;
  for (std::int64_t i = 0; i < model.head_dim / 2; ++i) {
    low += (i == 0 ? "" : ", ") + std::to_string(1 + i) + ".5";
    high += (i == 0 ? "" : ", ") + std::to_string(2 + i) + ".25";
  }
  return begin + original + R"(, "short_factor": [)" + low + R"(], "long_factor": [)" + high + "]}";
}

std::string kind_json(const char* name, Table table) {
  const char* kind = table == Table::ternary ? "ternary" : table == Table::int8 ? "int8" : "float";
  return std::string("\"") + name + R"(": {"kind": ")" + kind + "\"}";
}

std::string modules_json(const TinyModel& model) {
  std::string modules = kind_json("model.embed_tokens", model.embedding);
  const Table head = model.tied ? model.embedding : model.head;
  modules += ", " + kind_json("lm_head", head);
  if (model.mixed) {
    modules += R"(, "model.layers.0.mlp.up_proj": {"kind": "ternary", "weight_granularity": "per_channel"})";
    modules += R"(, "model.layers.1.self_attn.o_proj": {"kind": "float"})";
  }
  return "{" + modules + "}";
}

void write_text(const fs::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) throw std::runtime_error(path.string() + " cannot be written");
}

}  // namespace

std::vector<TinyModel> tiny_models() {
  using enum Granularity;
  return {{.biases = true, .rope = "llama3"},
          {.architecture = "qwen3",
           .quant = {per_group, bitcore::ActivationDtype::int8, per_group, 32},
           .embedding = Table::ternary,
           .tied = true,
           .rope = "yarn"},
          {.architecture = "bitnet", .tied = true, .activation = "relu2"},
          {.architecture = "granite", .head = Table::float16, .rope = "longrope"}};
}

std::string config_json(const TinyModel& model) {
  const auto number = [](const char* key, std::int64_t value) {
    return std::string("\"") + key + "\": " + std::to_string(value) + ", ";
  };
  const auto flag = [](const char* key, bool value) {
    return std::string("\"") + key + "\": " + (value ? "true" : "false") + ", ";
  };
  const auto text = [](const char* key, std::string_view value) {
    return std::string("\"") + key + "\": \"" + std::string(value) + "\"";
  };
  std::string json = "{" + text("model_type", model.architecture) + ", " + text("hidden_act", model.activation) + ", ";
  json += number("vocab_size", model.vocab) + number("hidden_size", model.hidden) +
          number("intermediate_size", model.inner) + number("num_hidden_layers", model.layers) +
          number("num_attention_heads", model.heads) + number("num_key_value_heads", model.key_value_heads) +
          number("head_dim", model.head_dim) + number("max_position_embeddings", model.context);
  json += R"("rms_norm_eps": 1e-05, "eos_token_id": [2, 3], )";
  json +=
      flag("tie_word_embeddings", model.tied) + flag("attention_bias", model.biases) + flag("mlp_bias", model.biases);
  if (model.architecture == "granite") {
    json += R"("embedding_multiplier": 12.0, "residual_multiplier": 0.25, "logits_scaling": 8.0, )";
    json += R"("attention_multiplier": 0.2, )";
  }
  json += "\"rope_parameters\": " + rope_json(model) + ", ";
  json += R"("quantization_config": {"quant_method": "bitlab", "format": 1, "state": "deployed", )";
  json += text("weight_granularity", to_string(model.quant.weight_granularity)) + ", ";
  json += text("activation_dtype", to_string(model.quant.activation_dtype)) + ", ";
  json += text("activation_granularity", to_string(model.quant.activation_granularity)) + ", ";
  return json + number("group_size", model.quant.group_size) + "\"modules\": " + modules_json(model) + "}}";
}

void write_tiny_model(const std::string& directory, const TinyModel& model) {
  const auto tensors = Builder(model).build();
  bitcore::SafetensorsWriter writer;
  for (const auto& [name, tensor] : tensors) writer.add(name, tensor.dtype, tensor.shape, tensor.bytes);
  writer.save((fs::path(directory) / "model.safetensors").string());
  write_text(fs::path(directory) / "config.json", config_json(model));
}

void write_sharded(const std::string& directory, const TinyModel& model) {
  const auto tensors = Builder(model).build();
  const std::string names[] = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
  bitcore::SafetensorsWriter writers[2];
  std::string map;
  std::size_t count = 0;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t shard = count++ % 2;
    writers[shard].add(name, tensor.dtype, tensor.shape, tensor.bytes);
    map += (map.empty() ? "\"" : ", \"") + name + "\": \"" + names[shard] + '"';
  }
  for (const std::size_t shard : {0, 1}) writers[shard].save((fs::path(directory) / names[shard]).string());
  write_text(fs::path(directory) / "model.safetensors.index.json", "{\"weight_map\": {" + map + "}}");
  write_text(fs::path(directory) / "config.json", config_json(model));
}

}  // namespace bitmodels::testing
