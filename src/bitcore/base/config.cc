#include "bitcore/config.h"

#include <algorithm>

#include "bitcore/base/checks.h"
#include "bitcore/exceptions.h"

namespace bitcore {
namespace {

std::string quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

[[noreturn]] void reject(std::string_view argument, std::string_view allowed, std::string_view text) {
  throw QuantizationError(std::string(argument) + " must be " + std::string(allowed) + ", got " + quoted(text));
}

}  // namespace

void check_config(const BitQuantConfig& config) {
  const bool groups = config.weight_granularity == Granularity::per_group;
  if (config.activation_granularity == Granularity::per_group) {
    if (!groups) {
      fail("activation_granularity is 'per_group' and weight_granularity is '", to_string(config.weight_granularity),
           "', expected 'per_group' for both");
    }
    if (config.activation_dtype == ActivationDtype::float32) {
      fail("activation_granularity is 'per_group' and activation_dtype is 'float32', expected 'int8'");
    }
  }
  if (!groups && config.group_size != kDefaultGroupSize) {
    fail("group_size is ", config.group_size, " and weight_granularity is '", to_string(config.weight_granularity),
         "', expected ", kDefaultGroupSize, ", or 'per_group'");
  }
  if (std::ranges::find(kGroupSizes, config.group_size) == std::end(kGroupSizes)) {
    fail("group_size is ", config.group_size, ", expected 32, 64, 128 or 256");
  }
}

std::vector<BitQuantConfig> all_configs() {
  using enum Granularity;
  using enum ActivationDtype;
  std::vector<BitQuantConfig> configs;
  for (const Granularity weight : {per_tensor, per_channel}) {
    for (const ActivationDtype dtype : {float32, int8}) {
      for (const Granularity x : {per_tensor, per_channel}) configs.push_back({weight, dtype, x});
    }
  }
  for (const std::int64_t group_size : kGroupSizes) {
    for (const ActivationDtype dtype : {float32, int8}) {
      for (const Granularity x : {per_tensor, per_channel}) configs.push_back({per_group, dtype, x, group_size});
    }
    configs.push_back({per_group, int8, per_group, group_size});
  }
  return configs;
}

Granularity parse_granularity(std::string_view text, std::string_view argument) {
  if (text == "per_tensor") return Granularity::per_tensor;
  if (text == "per_channel") return Granularity::per_channel;
  if (text == "per_group") return Granularity::per_group;
  reject(argument, "'per_tensor', 'per_channel' or 'per_group'", text);
}

ActivationDtype parse_activation_dtype(std::string_view text, std::string_view argument) {
  if (text == "float32") return ActivationDtype::float32;
  if (text == "int8") return ActivationDtype::int8;
  reject(argument, "'float32' or 'int8'", text);
}

std::string_view to_string(Granularity granularity) {
  switch (granularity) {
    case Granularity::per_tensor:
      return "per_tensor";
    case Granularity::per_channel:
      return "per_channel";
    case Granularity::per_group:
      return "per_group";
  }
  return "unknown";
}

std::string_view to_string(ActivationDtype dtype) { return dtype == ActivationDtype::float32 ? "float32" : "int8"; }

std::string to_string(const BitQuantConfig& config) {
  return "BitQuantConfig(weight_granularity=" + quoted(to_string(config.weight_granularity)) +
         ", activation_dtype=" + quoted(to_string(config.activation_dtype)) +
         ", activation_granularity=" + quoted(to_string(config.activation_granularity)) +
         ", group_size=" + std::to_string(config.group_size) + ")";
}

}  // namespace bitcore
