// bitcore/torch.h against the engine's own functions (bits), against the straight-through step in plain LibTorch
// (gradients), and in training.
#include "bitcore/torch.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/container/functional.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>

#include <string>
#include <thread>
#include <vector>

#include "support.h"

namespace bitcore::testing {
namespace {

using bitcore::torch::BitLinear;

constexpr std::int64_t kIn = 37, kOut = 19;

/// Configs that a test runs over.
class TorchAdapter : public ::testing::TestWithParam<BitQuantConfig> {
 protected:
  // Small tensors gain nothing from threads; ManyThreadsGetTheBitsOfOne brings its own and asks for more.
  void SetUp() override {
    at::manual_seed(0);
    at::set_num_threads(1);
  }
};

std::string name_of_config(const ::testing::TestParamInfo<BitQuantConfig>& info) {
  std::string name(to_string(info.param.weight_granularity));
  name += "_" + std::string(to_string(info.param.activation_dtype));
  return name + "_" + std::string(to_string(info.param.activation_granularity)) + "_" +
         std::to_string(info.param.group_size);
}

INSTANTIATE_TEST_SUITE_P(Configs, TorchAdapter, ::testing::ValuesIn(all_configs()), name_of_config);

BitQuantConfig per_token() { return {.activation_granularity = Granularity::per_channel}; }

Floats floats_of(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.detach().to(at::kFloat).contiguous();
  return {dense.const_data_ptr<float>(), dense.const_data_ptr<float>() + dense.numel()};
}

void expect_same_bits(const at::Tensor& actual, const at::Tensor& expected) {
  EXPECT_EQ(actual.scalar_type(), expected.scalar_type());
  EXPECT_EQ(actual.sizes(), expected.sizes());
  EXPECT_EQ(bits_of(floats_of(actual)), bits_of(floats_of(expected)));
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected, double relative = 1e-5) {
  ASSERT_TRUE(actual.defined());
  ASSERT_EQ(actual.sizes(), expected.sizes());
  const double largest = expected.abs().max().item<double>();
  EXPECT_LE((actual.to(at::kDouble) - expected).abs().max().item<double>(), relative * largest);
}

struct Case {
  at::Tensor x, weight, bias;
};

Case make_case(at::IntArrayRef leading, at::ScalarType dtype = at::kFloat) {
  std::vector<std::int64_t> shape = leading.vec();
  shape.push_back(kIn);
  return {at::randn(shape).to(dtype), at::randn({kOut, kIn}).to(dtype), at::randn({kOut}).to(dtype)};
}

Case leaves(const Case& values) {
  return {values.x.clone().requires_grad_(), values.weight.clone().requires_grad_(),
          values.bias.clone().requires_grad_()};
}

/// dq(x) and dq(W) by BitNet b1.58's formulas, in LibTorch's own operations.
at::Tensor quantized_weight(const at::Tensor& weight, const BitQuantConfig& config) {
  const at::Tensor magnitude = weight.to(at::kDouble).abs();
  if (config.weight_granularity == Granularity::per_group) {
    std::vector<at::Tensor> groups;
    for (const at::Tensor& group : weight.to(at::kFloat).split(config.group_size, 1)) {
      const at::Tensor mean = group.to(at::kDouble).abs().mean(1, /*keepdim=*/true).to(at::kFloat);
      const at::Tensor scale = mean.clamp_min(0x1p-14).to(at::kHalf).to(at::kFloat);
      groups.push_back((group / scale).round().clamp(-1, 1) * scale);
    }
    return at::cat(groups, 1);
  }
  const at::Tensor mean =
      config.weight_granularity == Granularity::per_channel ? magnitude.mean(1, /*keepdim=*/true) : magnitude.mean();
  const at::Tensor scale = mean.to(at::kFloat).clamp_min(1e-5);
  return (weight.to(at::kFloat) / scale).round().clamp(-1, 1) * scale;
}

at::Tensor quantized_x(const at::Tensor& x, const BitQuantConfig& config) {
  if (config.activation_dtype == ActivationDtype::float32) return x.to(at::kFloat);
  if (config.activation_granularity == Granularity::per_group) {
    const BitQuantConfig per_row;
    std::vector<at::Tensor> groups;
    for (const at::Tensor& group : x.split(config.group_size, -1)) groups.push_back(quantized_x(group, per_row));
    return at::cat(groups, -1);
  }
  const at::Tensor magnitude = x.to(at::kFloat).abs();
  const at::Tensor absmax =
      config.activation_granularity == Granularity::per_channel ? magnitude.amax(-1, true) : magnitude.amax();
  const at::Tensor scale = absmax.clamp_min(1e-5) / at::full({}, 127.0f);
  return (x.to(at::kFloat) / scale).round().clamp(-128, 127) * scale;
}

/// The straight-through step: values of the quantized tensors, gradients of the plain ones.
at::Tensor plain_step(const Case& leaves, const BitQuantConfig& config) {
  const at::Tensor x = leaves.x + (quantized_x(leaves.x.detach(), config) - leaves.x.detach());
  const at::Tensor weight = leaves.weight + (quantized_weight(leaves.weight.detach(), config) - leaves.weight.detach());
  return at::linear(x.to(at::kDouble), weight.to(at::kDouble), leaves.bias.to(at::kDouble));
}

TEST_P(TorchAdapter, ForwardHasTheEnginesBits) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const Case c = make_case({2, 3}, dtype);
    const Floats weight = floats_of(c.weight), x = floats_of(c.x), bias = floats_of(c.bias);
    const auto prepared = bitlinear::prepare_weights({weight.data(), kOut, kIn}, GetParam());
    Floats y(6 * kOut);
    bitlinear::forward({x.data(), 6, kIn}, prepared, {bias.data(), kOut}, GetParam(), {y.data(), 6, kOut});
    const at::Tensor expected = at::from_blob(y.data(), {2, 3, kOut}).to(dtype);

    const auto weights = torch::prepare_weights(c.weight, GetParam());
    const auto* bytes = weights.qweight.const_data_ptr<std::uint8_t>();
    EXPECT_EQ(std::vector<std::uint8_t>(bytes, bytes + weights.qweight.numel()), prepared.qweight);
    EXPECT_EQ(floats_of(weights.scale), testing::floats_of(prepared.scale));
    expect_same_bits(torch::forward(c.x, weights, c.bias, GetParam()), expected);
    expect_same_bits(torch::forward_training(c.x, c.weight, c.bias, GetParam()), expected);
  }
}

TEST_P(TorchAdapter, GradientsAreThoseOfPlainLibTorch) {
  const std::vector<std::vector<std::int64_t>> leading = {{}, {1}, {7}, {2, 3}};
  for (const auto& shape : leading) {
    const Case values = make_case(shape);
    const Case ours = leaves(values), plain = leaves(values), frozen = leaves(values);
    const at::Tensor y = torch::forward_training(ours.x, ours.weight, ours.bias, GetParam());
    const at::Tensor dy = at::randn_like(y);
    y.backward(dy);
    const at::Tensor expected = plain_step(plain, GetParam());
    expected.backward(dy.to(at::kDouble));
    expect_close(y, expected);
    expect_close(ours.x.grad(), plain.x.grad());
    expect_close(ours.weight.grad(), plain.weight.grad());
    expect_close(ours.bias.grad(), plain.bias.grad());

    const auto weights = torch::prepare_weights(frozen.weight, GetParam());
    torch::forward(frozen.x, weights, frozen.bias, GetParam()).backward(dy);
    expect_same_bits(frozen.x.grad(), ours.x.grad());
    expect_same_bits(frozen.bias.grad(), ours.bias.grad());
    EXPECT_FALSE(frozen.weight.grad().defined());
  }
}

TEST_P(TorchAdapter, TrainsAndDeploysToTheSameBits) {
  ::torch::nn::Sequential model(BitLinear(16, 64, GetParam()), ::torch::nn::Functional(at::relu),
                                BitLinear(64, 3, GetParam()));
  ::torch::optim::Adam optimizer(model->parameters(), 0.01);
  const at::Tensor x = at::randn({256, 16});
  const at::Tensor target = at::stack({x.select(1, 0) - x.select(1, 1), x.select(1, 2).abs(), x.sum(1) / 4}, 1);
  std::vector<double> losses;
  for (int step = 0; step < 150; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = at::mse_loss(model->forward(x), target);
    loss.backward();
    optimizer.step();
    losses.push_back(loss.item<double>());
  }
  EXPECT_LT(losses.back(), 0.3 * losses.front());
  const at::Tensor trained = model->forward(x).detach();
  for (const auto& module : model->children()) {
    if (auto* layer = module->as<torch::BitLinearImpl>()) layer->deploy();
  }
  EXPECT_EQ(model->parameters().size(), 2u) << "the biases are left";
  expect_same_bits(model->forward(x).detach(), trained);
}

TEST_P(TorchAdapter, StridesAndEmptyBatches) {
  const Case c = make_case({4});
  const auto weights = torch::prepare_weights(c.weight, GetParam());
  const at::Tensor expected = torch::forward(c.x, weights, c.bias, GetParam());
  const auto same = [&](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
    expect_same_bits(torch::forward(x, weights, bias, GetParam()), expected);
    expect_same_bits(torch::forward_training(x, weight, bias, GetParam()), expected);
    expect_same_bits(torch::prepare_weights(weight, GetParam()).qweight, weights.qweight);
  };
  const at::Tensor row = c.x.slice(0, 0, 1);
  expect_same_bits(torch::forward(row.expand({5, kIn}), weights, c.bias, GetParam()),
                   torch::forward(row.repeat({5, 1}), weights, c.bias, GetParam()));
  const auto strided = [](const at::Tensor& t) { return at::stack({t, t}, -1).select(-1, 0); };
  same(c.x.t().contiguous().t(), c.weight.t().contiguous().t(), c.bias);
  same(strided(c.x), strided(c.weight), strided(c.bias));
  // Tensors that torch negates when they are read, not when they are made.
  const auto negated = [](const at::Tensor& t) { return at::imag(at::complex(t, at::neg(t)).conj()); };
  ASSERT_TRUE(negated(c.x).is_neg());
  same(negated(c.x), negated(c.weight), negated(c.bias));

  const Case empty = leaves(make_case({0, 5}));
  const at::Tensor y = torch::forward_training(empty.x, empty.weight, empty.bias, GetParam());
  EXPECT_EQ(y.sizes(), (at::IntArrayRef{0, 5, kOut}));
  y.sum().backward();
  EXPECT_EQ(empty.weight.grad().abs().sum().item<double>(), 0.0);
  EXPECT_EQ(empty.x.grad().sizes(), empty.x.sizes());
}

/// Autocast for as long as it lives.
struct Autocast {
  Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  }
  ~Autocast() { at::autocast::set_autocast_enabled(at::kCPU, false); }
};

TEST_P(TorchAdapter, AutocastDecidesTheOutputDtypeAlone) {
  const Case values = make_case({4});
  const Case inside = leaves(values), outside = leaves(values);
  const at::Tensor dy = at::randn({4, kOut}).to(at::kBFloat16);
  const at::Tensor wide = torch::forward_training(outside.x, outside.weight, outside.bias, GetParam());
  wide.backward(dy.to(at::kFloat));
  {
    const Autocast autocast;
    const at::Tensor narrow = torch::forward_training(inside.x, inside.weight, inside.bias, GetParam());
    expect_same_bits(narrow, wide.to(at::kBFloat16));
    const auto weights = torch::prepare_weights(values.weight, GetParam());
    expect_same_bits(torch::forward(values.x, weights, values.bias, GetParam()), narrow);
    narrow.backward(dy);
  }
  expect_same_bits(inside.x.grad(), outside.x.grad());
  expect_same_bits(inside.weight.grad(), outside.weight.grad());
  expect_same_bits(inside.bias.grad(), outside.bias.grad());
}

TEST_P(TorchAdapter, ManyThreadsGetTheBitsOfOne) {
  at::set_num_threads(2);
  BitLinear layer(kIn, kOut, GetParam());
  std::vector<at::Tensor> inputs, expected;
  for (int i = 0; i < 8; ++i) {
    inputs.push_back(at::randn({5, kIn}).requires_grad_());
    const at::Tensor y = layer->forward(inputs.back());
    expected.push_back(at::cat({y, ::torch::autograd::grad({y.sum()}, {inputs.back()})[0]}, 1).detach());
  }
  std::vector<at::Tensor> found(inputs.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 5; ++repeat) {
        const at::Tensor y = layer->forward(inputs[i]);
        found[i] = at::cat({y, ::torch::autograd::grad({y.sum()}, {inputs[i]})[0]}, 1).detach();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < inputs.size(); ++i) expect_same_bits(found[i], expected[i]);
}

TEST(TorchAdapterGradients, HaveTheDtypeOfTheirArgument) {
  const Case c = make_case({4});
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const auto leaf = [](const at::Tensor& values, at::ScalarType type) {
      return values.to(type, /*non_blocking=*/false, /*copy=*/true).requires_grad_();
    };
    const at::Tensor x = leaf(c.x, dtype), bias = leaf(c.bias, dtype), weight = leaf(c.weight, at::kFloat);
    torch::forward_training(x, weight, bias, per_token()).sum().backward();
    EXPECT_EQ(x.grad().scalar_type(), dtype);
    EXPECT_EQ(bias.grad().scalar_type(), dtype);
    EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
  }
}

TEST(TorchAdapterGradients, OnlyWhatAsksForOneGetsOne) {
  const Case c = make_case({4});
  const at::Tensor weight = c.weight.clone().requires_grad_();
  EXPECT_FALSE(torch::forward_training(c.x, c.weight, {}, per_token()).requires_grad());
  torch::forward_training(c.x, weight, {}, per_token()).sum().backward();
  EXPECT_TRUE(weight.grad().defined());
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(torch::forward_training(c.x, weight, {}, per_token()).requires_grad());
}

TEST(TorchAdapterGradients, ThereIsNoSecondDerivative) {
  const Case c = leaves(make_case({4}));
  const at::Tensor y = torch::forward_training(c.x, c.weight, {}, per_token());
  EXPECT_THROW(::torch::autograd::grad({y.sum()}, {c.x}, {}, /*retain_graph=*/true, /*create_graph=*/true),
               c10::NotImplementedError);
}

TEST(TorchAdapterWeights, CodesArePackedOnEveryCall) {
  const Case c = make_case({4});
  const auto weights = torch::prepare_weights(c.weight, per_token());
  const at::Tensor codes = (c.weight / weights.scale).round().clamp(-1, 1).to(at::kChar);
  const at::Tensor x = c.x.clone().requires_grad_(), other = c.x.clone().requires_grad_();
  const at::Tensor y = torch::forward(x, weights.scale, codes, c.bias, per_token());
  const at::Tensor packed = torch::forward(other, weights, c.bias, per_token());
  expect_same_bits(y, packed);
  y.sum().backward();
  packed.sum().backward();
  expect_same_bits(x.grad(), other.grad());
}

TEST(TorchAdapterWeights, NonFiniteOnesTrainToNanAndAreNotPrepared) {
  Case c = make_case({4});
  c.weight[2][2] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(torch::forward_training(c.x, c.weight, {}, per_token()).isnan().all().item<bool>());
  expect_error<QuantizationError>([&] { torch::prepare_weights(c.weight, per_token()); }, {"weight", "NaN"});
}

TEST(TorchAdapterLayer, IsInitializedAsTorchsLinear) {
  at::manual_seed(7);
  const ::torch::nn::Linear plain(kIn, kOut);
  at::manual_seed(7);
  const BitLinear ours(kIn, kOut);
  EXPECT_LE((plain->weight - ours->weight).abs().max().item<double>(), 1e-7);
  EXPECT_LE((plain->bias - ours->bias).abs().max().item<double>(), 1e-7);
  EXPECT_FALSE(BitLinear(kIn, kOut, BitQuantConfig(), false)->bias.defined());
}

TEST(TorchAdapterLayer, StaysPackedWhateverItIsCastTo) {
  BitLinear layer(kIn, kOut, per_token());
  layer->deploy();
  const at::Tensor scale = layer->qweight_scale.clone(), qweight = layer->qweight.clone();
  layer->to(at::kHalf);
  layer->to(at::kCPU, at::kHalf);
  EXPECT_EQ(layer->bias.scalar_type(), at::kHalf);
  expect_same_bits(layer->qweight_scale, scale);
  EXPECT_TRUE(at::equal(layer->named_buffers()["qweight"], qweight));
  EXPECT_EQ(layer->forward(at::randn({2, kIn}).to(at::kHalf)).scalar_type(), at::kHalf);
}

TEST(TorchAdapterLayer, ComputesTheSameInBothModesOnceDeployed) {
  BitLinear layer(kIn, kOut);
  layer->deploy();
  const at::Tensor x = at::randn({2, kIn});
  const at::Tensor y = layer->forward(x);
  layer->train();
  EXPECT_TRUE(layer->is_training());
  expect_same_bits(layer->forward(x), y);
}

TEST(TorchAdapterLayer, RefusesWhatItsStateDoesNotAllow) {
  BitLinear layer(kIn, kOut);
  layer->deploy();
  EXPECT_FALSE(layer->is_training());
  expect_error<StateError>([&] { layer->deploy(); }, {"deploy", "already"});
  expect_error<QuantizationError>([] { BitLinear(1 << 24, 1); }, {"in_features", "16777215", "16777216"});
  expect_error<QuantizationError>([] { BitLinear(0, 1); }, {"in_features", "0"});
}

TEST(TorchAdapterErrors, NameTheArgumentAndBothValues) {
  const Case c = make_case({4});
  const auto weights = torch::prepare_weights(c.weight, per_token());
  const auto training = [&](const Case& changed) {
    return [=] { torch::forward_training(changed.x, changed.weight, changed.bias, per_token()); };
  };
  const auto inference = [&](const at::Tensor& x, const at::Tensor& scale, const at::Tensor& qweight,
                             const at::Tensor& bias) {
    return [=] { torch::forward(x, scale, qweight, bias, per_token()); };
  };
  struct BadX {
    at::Tensor x;
    std::vector<std::string> words;
  };
  const at::Tensor wide = at::ones({1, 1}).expand({1, 1 << 24});
  const std::vector<BadX> cases = {
      {{}, {"x is undefined"}},
      {c.x.to_sparse(), {"x is a Sparse tensor, expected a dense one"}},
      {c.x.to_sparse_csr(), {"x is a SparseCsr tensor, expected a dense one"}},
      {at::_nested_tensor_from_tensor_list({c.x, c.x}), {"x is a nested tensor"}},
      {at::quantize_per_tensor(c.x, 0.1, 0, at::kQInt8), {"x has dtype qint8, expected float32"}},
      {at::complex(c.x, c.x), {"x has dtype complex64, expected float32"}},
      {c.x.to(at::kDouble), {"x has dtype float64, expected float32"}},
      {c.x.to(at::kBool), {"x has dtype bool, expected float32"}},
      {c.x.to(at::kLong), {"x has dtype int64, expected float32"}},
      {at::ones({}), {"x has 0 dimensions"}},
      {at::ones({4, 36}), {"x has 36 features", "expects 37"}},
      {at::ones({4, 0}), {"x has ", "0"}},
  };
  for (const BadX& bad : cases) {
    expect_error<QuantizationError>(training({bad.x, c.weight, c.bias}), bad.words);
    expect_error<QuantizationError>(inference(bad.x, weights.scale, weights.qweight, c.bias), bad.words);
  }
  const at::Tensor meta_x = c.x.to(at::kMeta);
  expect_error<QuantizationError>(training({meta_x, c.weight, c.bias}), {"x is on meta, expected cpu"});
  expect_error<QuantizationError>(training({c.x, c.weight.to(at::kMeta), {}}), {"weight is on meta, expected cpu"});
  expect_error<QuantizationError>(training({c.x, c.weight, c.bias.to(at::kMeta)}), {"bias is on meta, expected cpu"});
  expect_error<QuantizationError>(training({c.x, {}, {}}), {"weight is undefined"});
  expect_error<QuantizationError>(training({c.x, c.weight[0], {}}), {"weight has 1 dimensions, expected 2"});
  expect_error<QuantizationError>(training({c.x, c.weight.to(at::kChar), {}}), {"weight must be float32", "got int8"});
  expect_error<QuantizationError>(training({c.x, c.weight.slice(0, 0, 0), {}}),
                                  {"out_features must be at least 1, got 0"});
  expect_error<QuantizationError>(training({wide, wide, {}}), {"in_features", "16777215", "16777216"});
  expect_error<QuantizationError>([&] { torch::prepare_weights(wide, {}); }, {"in_features", "16777215", "16777216"});
  expect_error<QuantizationError>([&] { torch::prepare_weights(c.weight.to(at::kMeta), {}); },
                                  {"weight is on meta, expected cpu"});
  expect_error<QuantizationError>([&] { torch::prepare_weights(c.weight.to_sparse(), {}); }, {"weight is a Sparse"});
  expect_error<QuantizationError>(training({c.x, c.weight, c.bias.slice(0, 1)}), {"bias has 18 elements", "19"});
  expect_error<QuantizationError>(training({c.x, c.weight, c.bias.to(at::kInt)}), {"bias has dtype int32"});
  expect_error<QuantizationError>(inference(c.x, at::ones({2}), weights.qweight, {}),
                                  {"qweight_scale has 2 elements", "expects 1"});
  expect_error<QuantizationError>([&] { torch::forward(c.x, weights, {}, {Granularity::per_channel}); },
                                  {"qweight_scale has 1 elements", "expects 19"});
  expect_error<QuantizationError>(inference(c.x, at::ones({}, at::kDouble), weights.qweight, {}),
                                  {"qweight_scale has dtype float64, expected float32"});
  expect_error<QuantizationError>(inference(c.x, at::full({}, -0.5), weights.qweight, {}), {"qweight_scale", "-0.5"});
  expect_error<QuantizationError>(inference(c.x, weights.scale, weights.qweight.to(at::kInt), {}),
                                  {"qweight has dtype int32, expected"});
  expect_error<QuantizationError>(inference(c.x, weights.scale, weights.qweight.slice(1, 1), {}), {"qweight"});
  expect_error<QuantizationError>(inference(c.x, weights.scale, weights.qweight.to_sparse(), {}),
                                  {"qweight is a Sparse tensor"});
  expect_error<QuantizationError>(inference(c.x, weights.scale, at::full({kOut, kIn}, 2, at::kChar), {}),
                                  {"qweight", "2"});
}

}  // namespace
}  // namespace bitcore::testing
