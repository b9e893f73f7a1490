#include "bitmodels/decoder.h"

#include <cmath>
#include <utility>

#include "bitcore/base/checks.h"

namespace bitmodels {
namespace {

using bitcore::fail_file;
using bitcore::TensorEntry;
using bitlayers::BitLinear;
using bitlayers::LayerTensors;

class Loader {
 public:
  Loader(const DecoderConfig& config, Checkpoint& checkpoint, bitcore::Verify verify)
      : config_(config), checkpoint_(checkpoint), verify_(verify) {}

  Decoder load() {
    const LanguageModelInfo& info = config_.info;
    Decoder decoder;
    decoder.config = config_;
    for (std::int64_t i = 0; i < info.num_layers; ++i) {
      decoder.layers.push_back(layer("model.layers." + std::to_string(i) + "."));
    }
    decoder.final_norm = floats("model.norm.weight", info.hidden_size);
    const std::string embedding = "model.embed_tokens", head = "lm_head";
    decoder.embedding = matrix(embedding, config_.table(embedding), info.vocab_size, info.hidden_size, false);
    if (!config_.tied) {
      decoder.own_head = matrix(head, config_.table(head), info.vocab_size, info.hidden_size, false);
    } else if (config_.modules.contains(head)) {
      decoder.own_head = tied_head(*decoder.embedding, config_.table(head));
    }
    checkpoint_.require_all_taken();
    return decoder;
  }

 private:
  DecoderLayer layer(const std::string& prefix) {
    const LanguageModelInfo& info = config_.info;
    const std::int64_t hidden = info.hidden_size, inner = config_.intermediate_size;
    const std::int64_t queries = info.num_heads * info.head_dim, keys = info.num_key_value_heads * info.head_dim;
    DecoderLayer layer;
    layer.input_norm = floats(prefix + "input_layernorm.weight", hidden);
    layer.feed_forward_norm = floats(prefix + "post_attention_layernorm.weight", hidden);
    const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
    if (config_.head_norms) {
      layer.query_norm = floats(attention + "q_norm.weight", info.head_dim);
      layer.key_norm = floats(attention + "k_norm.weight", info.head_dim);
    }
    if (config_.sub_norms) {
      layer.attention_sub_norm = floats(attention + "attn_sub_norm.weight", queries);
      layer.feed_forward_sub_norm = floats(mlp + "ffn_sub_norm.weight", inner);
    }
    layer.query = linear(attention + "q_proj", queries, hidden, config_.attention_bias);
    layer.key = linear(attention + "k_proj", keys, hidden, config_.attention_bias);
    layer.value = linear(attention + "v_proj", keys, hidden, config_.attention_bias);
    layer.output = linear(attention + "o_proj", hidden, queries, config_.attention_bias);
    layer.gate = linear(mlp + "gate_proj", inner, hidden, config_.mlp_bias);
    layer.up = linear(mlp + "up_proj", inner, hidden, config_.mlp_bias);
    layer.down = linear(mlp + "down_proj", hidden, inner, config_.mlp_bias);
    return layer;
  }

  Linear linear(const std::string& name, std::int64_t rows, std::int64_t cols, bool biased) {
    return matrix(name, config_.linear(name), rows, cols, biased);
  }

  Linear matrix(const std::string& name, const MatrixConfig& config, std::int64_t rows, std::int64_t cols,
                bool biased) {
    if (config.kind == MatrixConfig::Kind::ternary) return ternary(name, config, rows, cols, biased);
    return dense(name, config, rows, cols, biased);
  }

  Linear ternary(const std::string& name, const MatrixConfig& config, std::int64_t rows, std::int64_t cols,
                 bool biased) {
    LayerTensors tensors;
    tensors.qweight = &checkpoint_.take(name + ".qweight");
    tensors.qweight_scale = &checkpoint_.take(name + ".qweight_scale");
    if (biased) tensors.bias = &checkpoint_.take(name + ".bias");
    return BitLinear::load(checkpoint_.file_of(name + ".qweight"), tensors, rows, cols, config.quant, verify_);
  }

  Linear dense(const std::string& name, const MatrixConfig& config, std::int64_t rows, std::int64_t cols, bool biased) {
    const TensorEntry& entry = checkpoint_.take(name + ".weight");
    const bitcore::ConstMatrixView view = entry.matrix();
    const bool int8 = config.kind == MatrixConfig::Kind::int8;
    if (view.rows != rows || view.cols != cols) {
      fail_file(entry.name, "has shape (", view.rows, ", ", view.cols, "), expected (", rows, ", ", cols, ")");
    }
    if (int8 ? view.dtype != bitcore::DType::int8 : !bitcore::is_floating(view.dtype)) {
      fail_file(entry.name, "is ", to_string(view.dtype), ", expected ", int8 ? "int8" : "a floating dtype");
    }
    DenseTable table;
    table.file = checkpoint_.file_of(name + ".weight");
    table.matrix = {view.data, view.dtype, rows, cols, nullptr};
    if (int8) {
      table.scale = std::make_shared<const Floats>(scales(name + ".weight_scale", rows));
      table.matrix.scale = table.scale->data();
    }
    if (biased) table.bias = floats(name + ".bias", rows);
    return table;
  }

  Floats scales(const std::string& name, std::int64_t count) {
    Floats values = floats(name, count);
    for (const float value : values) {
      if (!(value > 0)) fail_file(checkpoint_.take(name).name, "holds ", value, ", expected positive scales");
    }
    return values;
  }

  // Contiguous, of any floating dtype, finite.
  Floats floats(const std::string& name, std::int64_t count) {
    const TensorEntry& entry = checkpoint_.take(name);
    if (entry.shape != std::vector<std::int64_t>{count}) {
      fail_file(entry.name, "has ", entry.numel(), " elements in ", entry.shape.size(), " dimensions, expected ", count,
                " in one");
    }
    Floats values = entry.floats();
    for (const float value : values) {
      if (!std::isfinite(value)) fail_file(entry.name, "holds NaN or infinity");
    }
    return values;
  }

  // The head's own entry in config.json gives the activations of a ternary one.
  std::optional<Linear> tied_head(const Linear& table, const MatrixConfig& config) {
    const MatrixConfig embedding = config_.table("model.embed_tokens");
    const bool alike = config.kind == embedding.kind &&
                       config.quant.weight_granularity == embedding.quant.weight_granularity &&
                       config.quant.group_size == embedding.quant.group_size;
    if (!alike) fail_file(checkpoint_.directory(), "config.json ties lm_head to an embedding of another kind");
    if (config.kind != MatrixConfig::Kind::ternary) return std::nullopt;
    const BitLinear& layer = std::get<BitLinear>(table);
    return BitLinear::view(layer.qweight(), layer.in_features(), layer.qweight_scale(), {}, config.quant,
                           checkpoint_.file_of("model.embed_tokens.qweight"), bitcore::Verify::trailer);
  }

  const DecoderConfig& config_;
  Checkpoint& checkpoint_;
  const bitcore::Verify verify_;
};

}  // namespace

Decoder load_decoder(const DecoderConfig& config, Checkpoint& checkpoint, bitcore::Verify verify) {
  return Loader(config, checkpoint, verify).load();
}

std::int64_t bytes_of(const Linear& linear) {
  if (const auto* layer = std::get_if<BitLinear>(&linear)) {
    const auto scale = layer->qweight_scale();
    return layer->packed_shape().bytes() + scale.size * static_cast<std::int64_t>(bitcore::size_of(scale.dtype));
  }
  const DenseTable& table = std::get<DenseTable>(linear);
  return table.matrix.rows * (table.matrix.cols * static_cast<std::int64_t>(bitcore::size_of(table.matrix.dtype))) +
         (table.scale ? static_cast<std::int64_t>(table.scale->size() * sizeof(float)) : 0);
}

}  // namespace bitmodels
