// A program of a user's, against the installed packages: trains a layer a few steps, packs it, saves it, reads it back,
// as bytes, as a layer and as a model, and runs it on every kernel of this machine and on one of its own, with the
// library's threads. Returns 0 where every result is right.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bitcore/exceptions.h"
#include "bitcore/executor.h"
#include "bitcore/io.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "bitlayers/bitlinear.h"
#include "bitmodels/mlp.h"

namespace {

constexpr std::int64_t kTokens = 20, kIn = 100, kOut = 40;

int failures = 0;

void check(bool holds, const std::string& what) {
  std::cout << (holds ? "ok      " : "FAILED  ") << what << "\n";
  if (!holds) ++failures;
}

// Values between -1 and 1 that repeat late.
std::vector<float> some_floats(std::int64_t count, int step) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(i * static_cast<std::size_t>(step) % 101) / 50.0f - 1.0f;
  }
  return values;
}

struct Layer {
  bitcore::BitQuantConfig config{.activation_granularity = bitcore::Granularity::per_channel};
  std::vector<float> weight = some_floats(kOut * kIn, 37);
  std::vector<float> bias = std::vector<float>(kOut);

  bitcore::ConstMatrixView weight_view() const { return {weight.data(), kOut, kIn}; }
};

using Outputs = std::vector<float>;

Outputs run(const Layer& layer, const std::vector<float>& x, const bitcore::bitlinear::PreparedWeights& weights,
            const bitcore::bitlinear::Options& options = {}) {
  Outputs y(kTokens * kOut);
  bitcore::bitlinear::forward({x.data(), kTokens, kIn}, weights, {layer.bias.data(), kOut}, layer.config,
                              {y.data(), kTokens, kOut}, options);
  return y;
}

// One step of gradient descent towards `target`; returns the mean squared error before it.
double train_step(Layer& layer, const std::vector<float>& x, const Outputs& target) {
  Outputs y(kTokens * kOut), dy(y.size());
  const auto saved =
      bitcore::bitlinear::forward_training({x.data(), kTokens, kIn}, layer.weight_view(), {layer.bias.data(), kOut},
                                           layer.config, {y.data(), kTokens, kOut});
  double loss = 0.0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    dy[i] = 2.0f * (y[i] - target[i]) / static_cast<float>(y.size());
    loss += (y[i] - target[i]) * (y[i] - target[i]) / static_cast<double>(y.size());
  }
  std::vector<float> dweight(layer.weight.size()), dbias(kOut);
  bitcore::bitlinear::backward({dy.data(), kTokens, kOut}, saved, layer.config,
                               {.dx = {}, .dweight = {dweight.data(), kOut, kIn}, .dbias = dbias.data()});
  constexpr float kRate = 0.5f;
  for (std::size_t i = 0; i < dweight.size(); ++i) layer.weight[i] -= kRate * dweight[i];
  for (std::size_t i = 0; i < dbias.size(); ++i) layer.bias[i] -= kRate * dbias[i];
  return loss;
}

void train(Layer& layer, const std::vector<float>& x) {
  const Outputs target = some_floats(kTokens * kOut, 53);
  const double first = train_step(layer, x, target);
  double last = first;
  for (int step = 0; step < 50; ++step) last = train_step(layer, x, target);
  check(last < 0.5 * first, "training: loss " + std::to_string(first) + " becomes " + std::to_string(last));
}

void check_training_equals_inference(const Layer& layer, const std::vector<float>& x, const Outputs& expected) {
  Outputs y(kTokens * kOut);
  bitcore::bitlinear::forward_training({x.data(), kTokens, kIn}, layer.weight_view(), {layer.bias.data(), kOut},
                                       layer.config, {y.data(), kTokens, kOut});
  check(y == expected, "training returns the bits of inference");
}

// Row 0 by the formula, in plain loops.
void check_formula(const Layer& layer, const std::vector<float>& x, const bitcore::bitlinear::PreparedWeights& weights,
                   const Outputs& y) {
  std::vector<std::int8_t> codes(layer.weight.size());
  bitcore::unpack_weights(weights.view(), {codes.data(), kOut, kIn});
  float absmax = 1e-5f;
  for (std::int64_t k = 0; k < kIn; ++k) absmax = std::max(absmax, std::fabs(x[static_cast<std::size_t>(k)]));
  const float x_scale = absmax / 127.0f;
  double largest = 0.0;
  for (std::int64_t n = 0; n < kOut; ++n) {
    double sum = 0.0;
    for (std::int64_t k = 0; k < kIn; ++k) {
      sum += std::nearbyint(x[static_cast<std::size_t>(k)] / x_scale) * codes[static_cast<std::size_t>(n * kIn + k)];
    }
    const auto i = static_cast<std::size_t>(n);
    largest = std::max(largest, std::fabs(sum * x_scale * weights.scale[0] + layer.bias[i] - y[i]));
  }
  check(largest < 1e-5, "inference is the formula");
}

void check_kernels(const Layer& layer, const std::vector<float>& x, const bitcore::bitlinear::PreparedWeights& weights,
                   const Outputs& expected) {
  for (const auto& kernel : bitcore::KernelRegistry::all_kernels()) {
    if (!kernel->is_supported() || !kernel->is_compatible_with(layer.config)) continue;
    const Outputs y = run(layer, x, weights, {.executor = nullptr, .kernel = kernel->name()});
    check(y == expected, "same bits: " + std::string(kernel->name()));
  }
}

// A kernel of the user's own, that answers 42.
class FortyTwoKernel final : public bitcore::BitKernelBase {
 public:
  std::string_view name() const override { return "FortyTwoKernel"; }
  bool is_compatible_with(const bitcore::BitQuantConfig&) const override { return true; }
  void operator()(const bitcore::LinearArgs& args) const override {
    for (std::int64_t m = 0; m < args.y.rows; ++m) {
      std::fill_n(reinterpret_cast<float*>(args.y.row(m)), args.y.cols, 42.0f);
    }
  }
};

void check_registry(const Layer& layer, const std::vector<float>& x, const bitcore::bitlinear::PreparedWeights& weights,
                    const Outputs& expected) {
  bitcore::KernelRegistry::register_kernel(std::make_shared<FortyTwoKernel>());
  check(run(layer, x, weights) == Outputs(kTokens * kOut, 42.0f), "a registered kernel is used");
  bitcore::KernelRegistry::unregister_kernel("FortyTwoKernel");
  check(run(layer, x, weights) == expected, "and no longer when it is removed");
}

void check_layer(const Layer& layer, const std::vector<float>& x, const Outputs& expected) {
  const auto deployed = bitlayers::BitLinear::deploy(layer.weight_view(), {layer.bias.data(), kOut}, layer.config);
  Outputs y(kTokens * kOut);
  deployed.forward({x.data(), kTokens, kIn}, {y.data(), kTokens, kOut});
  check(y == expected, "bitlayers::BitLinear returns the same bits");
}

// A model of this layer alone, as Python writes it.
std::vector<std::byte> save(const Layer& layer) {
  const auto deployed = bitlayers::BitLinear::deploy(layer.weight_view(), {layer.bias.data(), kOut}, layer.config);
  bitcore::SafetensorsWriter writer;
  deployed.add_to(writer, "layers.0.");
  const std::pair<const char*, std::string> metadata[] = {{"model_type", "bit_mlp"},
                                                          {"n_layers", "1"},
                                                          {"in_channels", std::to_string(kIn)},
                                                          {"hidden_dim", "1"},
                                                          {"out_channels", std::to_string(kOut)},
                                                          {"bias", "true"},
                                                          {"quant_config.weight_granularity", "per_tensor"},
                                                          {"quant_config.activation_dtype", "int8"},
                                                          {"quant_config.activation_granularity", "per_channel"}};
  for (const auto& [key, value] : metadata) writer.set_metadata(key, value);
  return writer.to_bytes();
}

void check_file(const Layer& layer, const std::vector<float>& x, const Outputs& expected) {
  const std::vector<std::byte> bytes = save(layer);
  const auto file = bitcore::SafetensorsFile::from_bytes(bytes, "saved");
  const bitcore::ConstMatrixView qweight = file.tensor("layers.0.qweight").matrix();
  bitcore::check_qweight(qweight, kIn);
  Outputs y(kTokens * kOut);
  bitcore::bitlinear::forward({x.data(), kTokens, kIn}, file.tensor("layers.0.qweight_scale").floats(), qweight,
                              file.tensor("layers.0.bias").vector(), layer.config, {y.data(), kTokens, kOut});
  check(y == expected, "the saved tensors return the same bits");
  const auto model = bitmodels::BitMLPModel::from_file(bitcore::SafetensorsFile::from_bytes(bytes, "saved"));
  y.assign(y.size(), 0.0f);
  model.forward({x.data(), kTokens, kIn}, {y.data(), kTokens, kOut});
  check(y == expected, "bitmodels::BitMLPModel returns the same bits");
}

// The threads that the library brings, in this program built by any compiler.
void check_threads() {
  std::vector<int> calls(100);
  bitcore::default_executor().run(100, [&](int task) { ++calls[static_cast<std::size_t>(task)]; });
  check(calls == std::vector<int>(100, 1), "default_executor() runs every task once");
}

void check_errors(const bitcore::bitlinear::PreparedWeights& weights) {
  bool thrown = false;
  try {
    bitcore::check_qweight(weights.view(), kIn + 1);
  } catch (const bitcore::QuantizationError& error) {
    thrown = std::string(error.what()).find("101") != std::string::npos;
  }
  check(thrown, "an error crosses the library's border, with its type and text");
}

}  // namespace

int main() {
  Layer layer;
  const std::vector<float> x = some_floats(kTokens * kIn, 29);
  train(layer, x);
  const auto weights = bitcore::bitlinear::prepare_weights(layer.weight_view(), layer.config);
  const Outputs y = run(layer, x, weights);
  check_training_equals_inference(layer, x, y);
  check_formula(layer, x, weights, y);
  check_kernels(layer, x, weights, y);
  check_registry(layer, x, weights, y);
  check_layer(layer, x, y);
  check_file(layer, x, y);
  check_threads();
  check_errors(weights);
  return failures == 0 ? 0 : 1;
}
