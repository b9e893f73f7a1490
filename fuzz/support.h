// What the fuzz targets and the maker of their seeds share: how an input is read, and how a broken promise ends a run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bitcore/io.h"
#include "bitcore/ops/packing.h"

namespace bitcore::fuzz {

/// Ends the run where a promise does not hold; libFuzzer then writes the input to a file.
inline void require(bool holds, const char* promise) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

/// Whether `call` throws Error. Every other exception ends the run.
template <class Error, class Call>
bool throws(const Call& call) {
  try {
    call();
    return false;
  } catch (const Error&) {
    return true;
  }
}

/// A qweight input begins with one byte for each of these; the bytes of the weight follow.
enum QweightField : std::size_t {
  kMode,         ///< What is kept valid: QweightMode.
  kOutFeatures,  ///< out_features - 1, modulo kMostOutFeatures.
  kInFeatures,   ///< in_features - 1, modulo kMostInFeatures.
  kLayout,       ///< Index into the layouts of the shape, modulo their number.
  kConfig,       ///< Bits: weight per channel, float32 activations, activations per channel, 20 rows of x.
  kKernel,       ///< Index into the kernels of the config, modulo their number.
  kQweightFields,
};

enum QweightMode : std::uint8_t {
  raw,             ///< Nothing: the bytes are the whole weight.
  valid_trailer,   ///< The trailer but for the checksum: the bytes are the payload, repeated or cut.
  valid_checksum,  ///< The checksum as well.
  kQweightModes,
};

inline constexpr std::int64_t kMostOutFeatures = 40;  // two tiles of 16 rows and a half
inline constexpr std::int64_t kMostInFeatures = 100;  // a few steps of any layout

/// A tensor of a safetensors file.
struct FileTensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string bytes;
};

/// @throws QuantizationError for metadata that is no UTF-8.
inline std::string safetensors(const std::map<std::string, std::string>& metadata,
                               const std::map<std::string, FileTensor>& tensors) {
  SafetensorsWriter writer;
  for (const auto& [key, value] : metadata) writer.set_metadata(key, value);
  for (const auto& [name, tensor] : tensors) {
    writer.add(name, tensor.dtype, tensor.shape, std::as_bytes(std::span(tensor.bytes)));
  }
  const std::vector<std::byte> file = writer.to_bytes();
  return {reinterpret_cast<const char*>(file.data()), file.size()};
}

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

/// Weights -1, 0, 1, -1, ...
inline std::vector<std::int8_t> some_codes(std::int64_t count) {
  std::vector<std::int8_t> codes(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::int8_t>(i % 3) - 1;
  return codes;
}

// A BitMLP of two layers, as save_pretrained() writes it.
inline constexpr std::int64_t kInChannels = 5, kHiddenDim = 4, kOutChannels = 3;

inline std::map<std::string, std::string> mlp_metadata() {
  return {{"model_type", "BitMLPModel"},
          {"n_layers", "2"},
          {"in_channels", std::to_string(kInChannels)},
          {"hidden_dim", std::to_string(kHiddenDim)},
          {"out_channels", std::to_string(kOutChannels)},
          {"bias", "true"},
          {"quant_config.weight_granularity", "per_tensor"},
          {"quant_config.activation_dtype", "int8"},
          {"quant_config.activation_granularity", "per_channel"}};
}

inline std::map<std::string, FileTensor> mlp_tensors(bool deployed) {
  std::map<std::string, FileTensor> tensors;
  for (const std::int64_t layer : {0, 1}) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    const std::int64_t rows = layer == 0 ? kHiddenDim : kOutChannels;
    const std::int64_t cols = layer == 0 ? kInChannels : kHiddenDim;
    const std::vector<std::int8_t> codes = some_codes(rows * cols);
    if (deployed) {
      const std::string packed = bytes_of(pack_weights({codes.data(), rows, cols}));
      tensors[prefix + "qweight"] = {"U8", {rows, static_cast<std::int64_t>(packed.size()) / rows}, packed};
      tensors[prefix + "qweight_scale"] = {"F32", {}, bytes_of(std::vector<float>{0.5f})};
    } else {
      tensors[prefix + "weight"] = {"F32", {rows, cols}, bytes_of(std::vector<float>(codes.begin(), codes.end()))};
    }
    tensors[prefix + "bias"] = {"F32", {rows}, bytes_of(std::vector<float>(static_cast<std::size_t>(rows), 0.25f))};
  }
  return tensors;
}

}  // namespace bitcore::fuzz
