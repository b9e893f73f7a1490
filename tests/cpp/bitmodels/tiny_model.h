// Small language models as directories. Their weights come from integers alone: the bytes are the same on every
// machine, and so hashes of what the models compute can stand in a test.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/ops/packing.h"

namespace bitmodels::testing {

/// What an embedding or a head is stored as.
enum class Table { ternary, int8, bfloat16, float16, float32 };

struct TinyModel {
  std::string architecture = "llama";                 ///< llama, qwen3, bitnet or granite: the model_type.
  bitcore::Layout layout = bitcore::Layout::two_bit;  ///< Of the matrices that can have it.
  bitcore::BitQuantConfig quant = {};
  Table embedding = Table::bfloat16;
  Table head = Table::int8;  ///< Ignored if tied.
  bool tied = false;
  bool biases = false;           ///< In all linear layers.
  bool mixed = false;            ///< One layer with scales of its own, and one in float16.
  std::string rope = "default";  ///< default, linear, llama3, yarn or longrope.
  std::string activation = "silu";
  std::int64_t hidden = 64, inner = 96, layers = 2, vocab = 80, context = 1024;
  std::int64_t heads = 4, key_value_heads = 2, head_dim = 16;
};

/// One model of each architecture, and of each kind of rotation but the linear one.
std::vector<TinyModel> tiny_models();

/// The config.json of a model.
std::string config_json(const TinyModel& model);

/// Writes the directory, which exists.
void write_tiny_model(const std::string& directory, const TinyModel& model);

/// The same with the tensors in two files and an index.
void write_sharded(const std::string& directory, const TinyModel& model);

}  // namespace bitmodels::testing
