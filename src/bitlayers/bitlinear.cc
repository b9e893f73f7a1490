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
  ConstVectorView scale;
  std::shared_ptr<const void> owner;
};

namespace {

void check_scale(ConstVectorView scale, std::int64_t out_features, std::int64_t in_features,
                 const BitQuantConfig& config) {
  bitcore::check_dtype(scale.dtype, bitcore::weight_scale_dtype(config), "qweight_scale");
  bitcore::check_size(scale.size, bitcore::weight_scale_size(out_features, in_features, config), "qweight_scale");
  bitcore::check_view(scale, "qweight_scale");
  const bitcore::FloatVector values(scale);
  for (std::int64_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i]) || values[i] <= 0) {
      bitcore::fail("qweight_scale holds ", values[i], ", expected finite and positive scales");
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

// Scales and what owns them: of groups the tensor of the file, otherwise a float32 copy.
struct OwnedScale {
  ConstVectorView values;
  std::shared_ptr<const void> owner;
};

OwnedScale copied(bitcore::FloatVector scale) {
  auto owner = std::make_shared<const bitcore::FloatVector>(std::move(scale));
  return {*owner, owner};
}

OwnedScale scale_of(const std::shared_ptr<const bitcore::SafetensorsFile>& file, const LayerTensors& tensors,
                    std::int64_t out_features, std::int64_t in_features, const BitQuantConfig& config) {
  const TensorEntry& tensor = require_tensor(tensors.qweight_scale, *tensors.qweight, "qweight_scale");
  OwnedScale scale;
  if (config.weight_granularity == bitcore::Granularity::per_group) {
    const ConstMatrixView matrix = tensor.matrix();
    check_file_shape(tensor, matrix, out_features, bitcore::weight_groups(in_features, config));
    scale = {{matrix.data, matrix.dtype, matrix.rows * matrix.cols}, file};
  } else {
    scale = copied(bitcore::FloatVector(tensor.floats()));
  }
  of_file(tensor, [&] { check_scale(scale.values, out_features, in_features, config); });
  return scale;
}

// Two owners as one.
std::shared_ptr<const void> both(std::shared_ptr<const void> first, std::shared_ptr<const void> second) {
  if (first == nullptr || first == second) return second;
  using Pair = std::pair<std::shared_ptr<const void>, std::shared_ptr<const void>>;
  return std::make_shared<const Pair>(std::move(first), std::move(second));
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
  check_scale(memory_->scale, shape_.out_features, shape_.in_features, config);
  check_bias(memory_->bias, shape_.out_features);
}

BitLinear::BitLinear(PreparedWeights weights, ConstVectorView bias, const BitQuantConfig& config)
    : BitLinear(own(weights, bias), weights.shape.in_features, config, Verify::every_byte) {}

std::shared_ptr<const BitLinear::Memory> BitLinear::own(PreparedWeights& weights, ConstVectorView bias) {
  struct Owned {
    std::vector<std::uint8_t> qweight;
    bitcore::FloatVector scale;
    std::vector<std::byte> bias;
  };
  bitcore::check_size(static_cast<std::int64_t>(weights.qweight.size()), weights.shape.bytes(), "qweight");
  bitcore::check_view(bias, "bias");
  const auto* bias_bytes = static_cast<const std::byte*>(bias.data);
  const std::size_t bias_size = static_cast<std::size_t>(bias.size) * bitcore::size_of(bias.dtype);
  auto owned = std::make_shared<Owned>();
  owned->qweight = std::move(weights.qweight);
  owned->scale = std::move(weights.scale);
  owned->bias.assign(bias_bytes, bias_bytes + bias_size);
  const ConstMatrixView qweight(owned->qweight.data(), weights.shape.out_features, weights.shape.row_bytes());
  if (bias) bias.data = owned->bias.data();
  const ConstVectorView scale = owned->scale;
  return std::make_shared<const Memory>(Memory{qweight, bias, scale, std::move(owned)});
}

BitLinear BitLinear::deploy(ConstMatrixView weight, ConstVectorView bias, const BitQuantConfig& config,
                            bitcore::Layout layout, bitcore::Executor& executor) {
  return {bitcore::bitlinear::prepare_weights(weight, config, layout, executor), bias, config};
}

BitLinear BitLinear::view(ConstMatrixView qweight, std::int64_t in_features, ConstVectorView scale,
                          ConstVectorView bias, const BitQuantConfig& config, std::shared_ptr<const void> owner,
                          Verify verify) {
  bitcore::check_view(scale, "qweight_scale");
  if (config.weight_granularity != bitcore::Granularity::per_group) {
    OwnedScale copy = copied(bitcore::FloatVector(scale));
    scale = copy.values;
    owner = both(std::move(owner), std::move(copy.owner));
  }
  return {std::make_shared<const Memory>(Memory{qweight, bias, scale, std::move(owner)}), in_features, config, verify};
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
    const OwnedScale scale = scale_of(file, tensors, out_features, in_features, config);
    return of_file(*tensors.qweight,
                   [&] { return view(qweight, in_features, scale.values, bias, config, std::move(file), verify); });
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
  const ConstVectorView scale = qweight_scale();
  const bool grouped = config_.weight_granularity == bitcore::Granularity::per_group;
  if (config_.weight_granularity != bitcore::Granularity::per_tensor) scale_shape = {out_features()};
  if (grouped) scale_shape.push_back(bitcore::weight_groups(in_features(), config_));
  writer.add(prefix + "qweight", qweight());
  writer.add(prefix + "qweight_scale", grouped ? "F16" : "F32", std::move(scale_shape),
             {static_cast<const std::byte*>(scale.data),
              static_cast<std::size_t>(scale.size) * bitcore::size_of(scale.dtype)});
  if (bias()) writer.add(prefix + "bias", bias());
}

ConstMatrixView BitLinear::qweight() const { return memory_->qweight; }

ConstVectorView BitLinear::qweight_scale() const { return memory_->scale; }

ConstVectorView BitLinear::bias() const { return memory_->bias; }

}  // namespace bitlayers
