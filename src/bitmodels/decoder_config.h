// config.json of a language model: one decoder with switches.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/io/json.h"
#include "bitlayers/layer_functions.h"
#include "bitlayers/rotary.h"
#include "bitmodels/language_model.h"

namespace bitmodels {

/// What one matrix of the model is.
struct MatrixConfig {
  enum class Kind { ternary, int8, floating } kind = Kind::ternary;
  bitcore::BitQuantConfig quant;  ///< Of ternary ones.
};

struct DecoderConfig {
  LanguageModelInfo info;
  std::int64_t intermediate_size = 0;
  bitlayers::Activation activation = bitlayers::Activation::silu;
  float rms_norm_eps = 0;
  bool tied = false;            ///< The head is the embedding's matrix.
  bool attention_bias = false;  ///< q, k, v and o have biases,
  bool mlp_bias = false;        ///< gate, up and down.
  bool head_norms = false;      ///< q_norm and k_norm per head, before the rotation.
  bool sub_norms = false;       ///< attn_sub_norm before o_proj, ffn_sub_norm before down_proj.
  float embedding_multiplier = 1, residual_multiplier = 1, logits_multiplier = 1;
  float attention_scale = 0;
  double rope_theta = 10000;
  bitlayers::RotaryScaling rope;

  MatrixConfig most;                            ///< Of linear layers that `modules` does not list.
  std::map<std::string, MatrixConfig> modules;  ///< Those that differ, embedding and head included.

  /// Of a linear layer; of the embedding or the head, which are floating unless they are listed.
  const MatrixConfig& linear(const std::string& name) const;
  MatrixConfig table(const std::string& name) const;
};

/// @param path Of config.json, for messages.
/// @throws FileError for anything that is missing, of a wrong type, or not supported.
DecoderConfig read_decoder_config(const bitcore::Json& json, const std::string& path);

}  // namespace bitmodels
