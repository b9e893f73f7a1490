#include "bitlayers/bitlinear.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "bitcore/base/checks.h"
#include "bitcore/ops/base.h"

namespace bitlayers {

using bitcore::BitQuantConfig;
using bitcore::ConstMatrixView;
using bitcore::ConstVectorView;
using bitcore::TensorEntry;
using bitcore::Verify;
using bitcore::bitlinear::PreparedWeights;

// Where a layer's parts lie: in what it owns itself, or in what `owner` owns.
struct BitLinear::Memory {
  ConstMatrixView qweight;
  ConstVectorView bias;
  std::vector<float> scale;
  std::shared_ptr<const void> owner;
};

namespace {

void check_scale(std::span<const float> scale, std::int64_t out_features, const BitQuantConfig& config) {
  bitcore::check_span(scale, "qweight_scale");
  bitcore::check_size(static_cast<std::int64_t>(scale.size()), bitcore::weight_scale_size(out_features, config),
                      "qweight_scale");
  for (const float value : scale) {
    if (!std::isfinite(value) || value <= 0) {
      bitcore::fail("qweight_scale holds ", value, ", expected finite and positive scales");
    }
  }
}

void check_bias(ConstVectorView bias, std::int64_t out_features) {
  bitcore::check_view(bias, "bias");
  if (!bias) return;
  bitcore::check_floating(bias.dtype, "bias");
  bitcore::check_size(bias.size, out_features, "bias");
  std::vector<float> values(static_cast<std::size_t>(bias.size));
  bitcore::convert({bias.data, bias.dtype, 1, bias.size, bias.size}, {values.data(), 1, bias.size});
  if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); })) {
    bitcore::fail("bias holds NaN or infinity");
  }
}

bitcore::PackedShape check_weight(ConstMatrixView qweight, std::int64_t in_features, Verify verify) {
  if (verify == Verify::every_byte) bitcore::check_qweight(qweight, in_features);
  return bitcore::check_trailer(qweight, in_features);
}

// What does not fit in a tensor of a file is the file's fault.
template <class Call>
auto of_file(const TensorEntry& tensor, const Call& call) {
  try {
    return call();
  } catch (const bitcore::FileError&) {
    throw;
  } catch (const bitcore::QuantizationError& error) {
    bitcore::fail_file(tensor.name, error.what());
  }
}

const TensorEntry& require_tensor(const TensorEntry* tensor, const TensorEntry& beside, const char* name) {
  if (tensor == nullptr) bitcore::fail_file(beside.name, "has no ", name, " beside it");
  return *tensor;
}

void check_file_shape(const TensorEntry& tensor, ConstMatrixView matrix, std::int64_t rows, std::int64_t cols) {
  if (matrix.rows != rows || matrix.cols != cols) {
    bitcore::fail_file(tensor.name, "has shape (", matrix.rows, ", ", matrix.cols, "), expected (", rows, ", ", cols,
                       ")");
  }
}

ConstVectorView bias_of(const LayerTensors& tensors, std::int64_t out_features) {
  if (tensors.bias == nullptr) return {};
  const ConstVectorView bias = tensors.bias->vector();
  of_file(*tensors.bias, [&] { check_bias(bias, out_features); });
  return bias;
}

std::vector<float> scale_of(const LayerTensors& tensors, std::int64_t out_features, const BitQuantConfig& config) {
  const TensorEntry& tensor = require_tensor(tensors.qweight_scale, *tensors.qweight, "qweight_scale");
  std::vector<float> scale = tensor.floats();
  of_file(tensor, [&] { check_scale(scale, out_features, config); });
  return scale;
}

const TensorEntry* find_tensor(const bitcore::SafetensorsFile& file, const std::string& name) {
  return file.contains(name) ? &file.tensor(name) : nullptr;
}

}  // namespace

LayerTensors LayerTensors::find(const bitcore::SafetensorsFile& file, std::string_view prefix) {
  const std::string start(prefix);
  return {find_tensor(file, start + "weight"), find_tensor(file, start + "qweight"),
          find_tensor(file, start + "qweight_scale"), find_tensor(file, start + "bias")};
}

BitLinear::BitLinear(std::shared_ptr<const Memory> memory, std::int64_t in_features, const BitQuantConfig& config,
                     Verify verify)
    : config_(config), shape_(check_weight(memory->qweight, in_features, verify)), memory_(std::move(memory)) {
  check_scale(memory_->scale, shape_.out_features, config);
  check_bias(memory_->bias, shape_.out_features);
}

BitLinear::BitLinear(PreparedWeights weights, ConstVectorView bias, const BitQuantConfig& config)
    : BitLinear(own(weights, bias), weights.shape.in_features, config, Verify::every_byte) {}

std::shared_ptr<const BitLinear::Memory> BitLinear::own(PreparedWeights& weights, ConstVectorView bias) {
  struct Owned {
    std::vector<std::uint8_t> qweight;
    std::vector<std::byte> bias;
  };
  bitcore::check_size(static_cast<std::int64_t>(weights.qweight.size()), weights.shape.bytes(), "qweight");
  bitcore::check_view(bias, "bias");
  const auto* bias_bytes = static_cast<const std::byte*>(bias.data);
  const std::size_t bias_size = static_cast<std::size_t>(bias.size) * bitcore::size_of(bias.dtype);
  auto owned = std::make_shared<Owned>();
  owned->qweight = std::move(weights.qweight);
  owned->bias.assign(bias_bytes, bias_bytes + bias_size);
  const ConstMatrixView qweight(owned->qweight.data(), weights.shape.out_features, weights.shape.row_bytes());
  if (bias) bias.data = owned->bias.data();
  return std::make_shared<const Memory>(Memory{qweight, bias, std::move(weights.scale), std::move(owned)});
}

BitLinear BitLinear::deploy(ConstMatrixView weight, ConstVectorView bias, const BitQuantConfig& config,
                            bitcore::Layout layout, bitcore::Executor& executor) {
  return {bitcore::bitlinear::prepare_weights(weight, config, layout, executor), bias, config};
}

BitLinear BitLinear::view(ConstMatrixView qweight, std::int64_t in_features, std::span<const float> scale,
                          ConstVectorView bias, const BitQuantConfig& config, std::shared_ptr<const void> owner,
                          Verify verify) {
  bitcore::check_span(scale, "qweight_scale");
  return {std::make_shared<const Memory>(Memory{qweight, bias, {scale.begin(), scale.end()}, std::move(owner)}),
          in_features, config, verify};
}

BitLinear BitLinear::load(std::shared_ptr<const bitcore::SafetensorsFile> file, const LayerTensors& tensors,
                          std::int64_t out_features, std::int64_t in_features, const BitQuantConfig& config,
                          Verify verify, bitcore::Executor& executor) {
  const ConstVectorView bias = bias_of(tensors, out_features);
  if (tensors.qweight != nullptr) {
    const ConstMatrixView qweight = tensors.qweight->matrix();
    if (qweight.rows != out_features) {
      bitcore::fail_file(tensors.qweight->name, "has ", qweight.rows, " rows, expected ", out_features);
    }
    const std::vector<float> scale = scale_of(tensors, out_features, config);
    return of_file(*tensors.qweight,
                   [&] { return view(qweight, in_features, scale, bias, config, std::move(file), verify); });
  }
  if (tensors.weight == nullptr) bitcore::fail("tensors has neither weight nor qweight, expected one of them");
  const ConstMatrixView weight = tensors.weight->matrix();
  check_file_shape(*tensors.weight, weight, out_features, in_features);
  return of_file(*tensors.weight, [&] { return deploy(weight, bias, config, bitcore::Layout::automatic, executor); });
}

void BitLinear::forward(ConstMatrixView x, bitcore::MatrixView y, const bitcore::bitlinear::Options& options) const {
  bitcore::bitlinear::forward(x, memory_->scale, memory_->qweight, memory_->bias, config_, y, options);
}

std::size_t BitLinear::workspace_size(std::int64_t rows, const bitcore::bitlinear::Options& options) const {
  return bitcore::bitlinear::workspace_size(rows, shape_, config_, options);
}

void BitLinear::add_to(bitcore::SafetensorsWriter& writer, const std::string& prefix) const {
  std::vector<std::int64_t> scale_shape;  // per tensor: a scalar
  if (config_.weight_granularity == bitcore::Granularity::per_channel) scale_shape = {out_features()};
  writer.add(prefix + "qweight", qweight());
  writer.add(prefix + "qweight_scale", "F32", std::move(scale_shape), std::as_bytes(qweight_scale()));
  if (bias()) writer.add(prefix + "bias", bias());
}

ConstMatrixView BitLinear::qweight() const { return memory_->qweight; }

std::span<const float> BitLinear::qweight_scale() const { return memory_->scale; }

ConstVectorView BitLinear::bias() const { return memory_->bias; }

}  // namespace bitlayers
