/// @file config.h
/// What is quantized, and how finely. Mirrors `bitcore.config`.
#pragma once

#include <string>
#include <string_view>

/// Everything of the engine.
namespace bitcore {

/// Over which elements one scale is shared.
enum class Granularity {
  per_tensor,   ///< One scale for the whole tensor.
  per_channel,  ///< Weights: one scale per output row. Activations: one per row of x (token or sample).
};

/// The type in which activations meet the weights.
enum class ActivationDtype {
  float32,  ///< Not quantized.
  int8,     ///< Quantized to -128..127 by their largest magnitude.
};

/// The quantization schema of one linear layer. Weights are always ternary (-1, 0, +1).
struct BitQuantConfig {
  Granularity weight_granularity = Granularity::per_tensor;       ///< One weight scale, or one per output row.
  ActivationDtype activation_dtype = ActivationDtype::int8;       ///< Whether activations are quantized.
  Granularity activation_granularity = Granularity::per_channel;  ///< One activation scale, or one per row of x.

  /// Equal in all members.
  friend bool operator==(const BitQuantConfig&, const BitQuantConfig&) = default;
};

/// "per_tensor" or "per_channel"; `argument` is named in the error.
/// @throws QuantizationError for any other text.
Granularity parse_granularity(std::string_view text, std::string_view argument);

/// "float32" or "int8"; `argument` is named in the error.
/// @throws QuantizationError for any other text.
ActivationDtype parse_activation_dtype(std::string_view text, std::string_view argument);

/// "per_tensor" or "per_channel": the inverse of parse_granularity().
std::string_view to_string(Granularity granularity);

/// "float32" or "int8": the inverse of parse_activation_dtype().
std::string_view to_string(ActivationDtype dtype);

/// As Python prints it: `BitQuantConfig(weight_granularity='per_tensor', ...)`.
std::string to_string(const BitQuantConfig& config);

}  // namespace bitcore
