#include "bitcore/config.h"

#include "bitcore/exceptions.h"
#include "bitcore/tensor.h"

namespace bitcore {
namespace {

std::string quoted(std::string_view text) { return "'" + std::string(text) + "'"; }

[[noreturn]] void reject(std::string_view argument, std::string_view allowed, std::string_view text) {
  throw QuantizationError(std::string(argument) + " must be " + std::string(allowed) + ", got " + quoted(text));
}

}  // namespace

Granularity parse_granularity(std::string_view text, std::string_view argument) {
  if (text == "per_tensor") return Granularity::per_tensor;
  if (text == "per_channel") return Granularity::per_channel;
  reject(argument, "'per_tensor' or 'per_channel'", text);
}

ActivationDtype parse_activation_dtype(std::string_view text, std::string_view argument) {
  if (text == "float32") return ActivationDtype::float32;
  if (text == "int8") return ActivationDtype::int8;
  reject(argument, "'float32' or 'int8'", text);
}

std::string_view to_string(Granularity granularity) {
  return granularity == Granularity::per_tensor ? "per_tensor" : "per_channel";
}

std::string_view to_string(ActivationDtype dtype) { return dtype == ActivationDtype::float32 ? "float32" : "int8"; }

std::string to_string(const BitQuantConfig& config) {
  return "BitQuantConfig(weight_granularity=" + quoted(to_string(config.weight_granularity)) +
         ", activation_dtype=" + quoted(to_string(config.activation_dtype)) +
         ", activation_granularity=" + quoted(to_string(config.activation_granularity)) + ")";
}

std::string_view to_string(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    case DType::int8:
      return "int8";
    case DType::uint8:
      return "uint8";
  }
  return "unknown";
}

}  // namespace bitcore
