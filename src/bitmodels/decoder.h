// The weights of a language model, by what they are for.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "bitlayers/bitlinear.h"
#include "bitlayers/layer_functions.h"
#include "bitmodels/checkpoint.h"
#include "bitmodels/decoder_config.h"

namespace bitmodels {

/// A vector of a norm or a bias, widened to float32.
using Floats = std::vector<float>;

/// A matrix that is not ternary, and what keeps it in memory.
struct DenseTable {
  bitlayers::DenseMatrix matrix;
  Floats bias;                          ///< Empty: none.
  std::shared_ptr<const Floats> scale;  ///< Of int8.
  std::shared_ptr<const bitcore::SafetensorsFile> file;
};

/// A linear layer.
using Linear = std::variant<bitlayers::BitLinear, DenseTable>;

/// All that are optional are there once it is loaded, but for norms that the architecture does not have.
struct DecoderLayer {
  Floats input_norm, feed_forward_norm;
  Floats query_norm, key_norm;  ///< Per head; empty: none.
  Floats attention_sub_norm, feed_forward_sub_norm;
  std::optional<Linear> query, key, value, output;
  std::optional<Linear> gate, up, down;
};

struct Decoder {
  DecoderConfig config;
  std::vector<DecoderLayer> layers;
  Floats final_norm;
  std::optional<Linear> embedding;
  std::optional<Linear> own_head;  ///< None: the embedding's matrix.

  const Linear& head() const { return own_head ? *own_head : *embedding; }
};

/// @throws FileError for tensors that are missing, misshapen, damaged, or that the model does not have.
Decoder load_decoder(const DecoderConfig& config, Checkpoint& checkpoint, bitcore::Verify verify);

/// Of all bytes of its weight and scales.
std::int64_t bytes_of(const Linear& linear);

}  // namespace bitmodels
