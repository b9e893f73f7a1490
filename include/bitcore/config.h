/// @file config.h
/// What is quantized, and how finely. Mirrors `bitcore.config`.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

/// Everything of the engine.
namespace bitcore {

/// Over which elements one scale is shared.
enum class Granularity {
  per_tensor,   ///< One scale for the whole tensor.
  per_channel,  ///< Weights: one scale per output row. Activations: one per row of x (token or sample).
  per_group,    ///< One scale for each group of BitQuantConfig::group_size adjacent in_features of a row.
};

/// The type in which activations meet the weights.
enum class ActivationDtype {
  float32,  ///< Not quantized.
  int8,     ///< Quantized to -128..127 by their largest magnitude.
};

/// BitQuantConfig::group_size where no scale is per group.
inline constexpr std::int64_t kDefaultGroupSize = 128;

/// What BitQuantConfig::group_size may be.
inline constexpr std::int64_t kGroupSizes[] = {32, 64, 128, 256};

/// The quantization schema of one linear layer. Weights are always ternary (-1, 0, +1).
struct BitQuantConfig {
  Granularity weight_granularity = Granularity::per_tensor;       ///< One weight scale, or one per row or group.
  ActivationDtype activation_dtype = ActivationDtype::int8;       ///< Whether activations are quantized.
  Granularity activation_granularity = Granularity::per_channel;  ///< One activation scale, or one per row or group;
                                                                  ///< per group only if weights are, and int8.
  std::int64_t group_size = kDefaultGroupSize;  ///< Of a per_group weight: 32, 64, 128 or 256; otherwise 128. The last
                                                ///< group of a row may be shorter.

  /// Equal in all members.
  friend bool operator==(const BitQuantConfig&, const BitQuantConfig&) = default;
};

/// Every public function that takes a config calls it.
/// @throws QuantizationError for a config that does not exist: a group_size that is none, or not 128 where nothing is
/// per group; activations per group that are float32, or whose weights are not per group.
void check_config(const BitQuantConfig& config);

/// Every config that exists: eight without groups first, then those with each group size.
std::vector<BitQuantConfig> all_configs();

/// "per_tensor", "per_channel" or "per_group"; `argument` is named in the error.
/// @throws QuantizationError for any other text.
Granularity parse_granularity(std::string_view text, std::string_view argument);

/// "float32" or "int8"; `argument` is named in the error.
/// @throws QuantizationError for any other text.
ActivationDtype parse_activation_dtype(std::string_view text, std::string_view argument);

/// "per_tensor", "per_channel" or "per_group": the inverse of parse_granularity().
std::string_view to_string(Granularity granularity);

/// "float32" or "int8": the inverse of parse_activation_dtype().
std::string_view to_string(ActivationDtype dtype);

/// As Python prints it: `BitQuantConfig(weight_granularity='per_tensor', ...)`.
std::string to_string(const BitQuantConfig& config);

}  // namespace bitcore
