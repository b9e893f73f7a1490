// BitQuantConfig: every config that exists, and errors for those that do not.
#include "bitcore/config.h"

#include <algorithm>

#include "bitcore/ops/bitlinear.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::expect_error;
using testing::Floats;
using enum Granularity;
using enum ActivationDtype;

TEST(Config, AllThatExist) {
  const std::vector<BitQuantConfig> configs = all_configs();
  EXPECT_EQ(configs.size(), 8u + 4u * 5u);
  for (const BitQuantConfig& config : configs) {
    check_config(config);
    EXPECT_EQ(std::count(configs.begin(), configs.end(), config), 1) << to_string(config);
  }
}

TEST(Config, Text) {
  EXPECT_EQ(to_string(BitQuantConfig{per_group, int8, per_group, 64}),
            "BitQuantConfig(weight_granularity='per_group', activation_dtype='int8', "
            "activation_granularity='per_group', group_size=64)");
  for (const Granularity granularity : {per_tensor, per_channel, per_group}) {
    EXPECT_EQ(parse_granularity(to_string(granularity), "it"), granularity);
  }
  expect_error<QuantizationError>([] { parse_granularity("per_row", "it"); }, {"it", "per_group", "per_row"});
}

// By every function that takes one.
void expect_refused(const BitQuantConfig& config, const std::vector<std::string>& words) {
  SCOPED_TRACE(to_string(config));
  const Floats weight(64, 1.0f);
  Floats y(2);
  const bitlinear::PreparedWeights prepared = bitlinear::prepare_weights({weight.data(), 2, 32}, {});
  expect_error<QuantizationError>([&] { check_config(config); }, words);
  expect_error<QuantizationError>([&] { weight_scale_size(2, 32, config); }, words);
  expect_error<QuantizationError>([&] { x_scale_size(2, 32, config); }, words);
  expect_error<QuantizationError>([&] { compute_weight_scale({weight.data(), 2, 32}, config); }, words);
  expect_error<QuantizationError>([&] { compute_x_scale({weight.data(), 2, 32}, config); }, words);
  expect_error<QuantizationError>([&] { bitlinear::prepare_weights({weight.data(), 2, 32}, config); }, words);
  expect_error<QuantizationError>([&] { bitlinear::workspace_size(1, prepared.shape, config); }, words);
  expect_error<QuantizationError>(
      [&] {
        bitlinear::forward({weight.data(), 1, 32}, prepared, {}, config, {y.data(), 1, 2});
      },
      words);
  expect_error<QuantizationError>(
      [&] {
        bitlinear::forward_training({weight.data(), 1, 32}, {weight.data(), 2, 32}, {}, config, {y.data(), 1, 2});
      },
      words);
  expect_error<QuantizationError>(
      [&] {
        bitlinear::backward({y.data(), 1, 2}, bitlinear::BackwardInputs{}, config, {});
      },
      words);
}

TEST(Config, ThatDoesNotExist) {
  for (const std::int64_t size : {0, 16, 48, 127, 512, -32}) {
    expect_refused({per_group, int8, per_channel, size}, {"group_size", std::to_string(size), "32, 64, 128 or 256"});
  }
  expect_refused({per_channel, int8, per_channel, 64}, {"group_size", "64", "per_channel", "128"});
  expect_refused({per_tensor, int8, per_group}, {"activation_granularity", "per_group", "per_tensor"});
  expect_refused({per_group, float32, per_group}, {"activation_granularity", "per_group", "float32", "int8"});
}

TEST(GroupScales, ThatDoNotFit) {
  const Floats weight(5 * 70, 0.5f), x(3 * 70, 1.0f);
  Floats y(15);
  const BitQuantConfig config{per_group, int8, per_channel, 32};
  const auto prepared = bitlinear::prepare_weights({weight.data(), 5, 70}, config);
  EXPECT_EQ(prepared.scale.size(), 15);
  EXPECT_EQ(prepared.scale.dtype(), DType::float16);
  const auto forward = [&](ConstVectorView scale) {
    bitlinear::forward({x.data(), 3, 70}, scale, prepared.view(), {}, config, {y.data(), 3, 5});
  };
  forward(prepared.scale);
  const Floats floats(15, 1.0f);
  expect_error<QuantizationError>([&] { forward(floats); }, {"qweight_scale", "float16", "float32"});
  expect_error<QuantizationError>(
      [&] {
        forward({prepared.scale.data(), DType::float16, 10});
      },
      {"qweight_scale", "10", "15", "groups of 32"});
  expect_error<QuantizationError>([&] { forward({nullptr, DType::float16, 15}); }, {"qweight_scale is null"});
  for (const float bad :
       {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    for (const std::int64_t place : {0, 7, 14}) {
      Floats values(15, 1.0f);
      values[static_cast<std::size_t>(place)] = bad;
      FloatVector scale(DType::float16, 15);
      const VectorView out = scale;
      convert({values.data(), 1, 15}, {out.data, out.dtype, 1, 15, 15});
      expect_error<QuantizationError>([&] { forward(scale); },
                                      {"qweight_scale", "finite and positive", std::to_string(place)});
    }
  }
}

TEST(GroupScales, OfWeightsThatFloat16CannotHold) {
  Floats weight(3 * 70, 1.0f), x(70, 1.0f), y(3);
  std::fill_n(weight.begin() + 70 + 32, 32, 65505.0f);
  const BitQuantConfig config{per_group, int8, per_channel, 32};
  expect_error<QuantizationError>(
      [&] {
        bitlinear::prepare_weights({weight.data(), 3, 70}, config);
      },
      {"weight", "65504", "row 1", "columns 32 to 63"});
  bitlinear::forward_training({x.data(), 1, 70}, {weight.data(), 3, 70}, {}, config, {y.data(), 1, 3});
  EXPECT_FALSE(std::isnan(y[0]));
  EXPECT_TRUE(std::isnan(y[1]));
  EXPECT_FALSE(std::isnan(y[2]));
}

TEST(FloatVectors, OwnWhatTheyHold) {
  const Floats values = {1.0f, -2.5f, 0.0f};
  const FloatVector copy{ConstVectorView(values)};
  EXPECT_EQ(testing::floats_of(copy), values);
  EXPECT_EQ(copy, FloatVector(ConstVectorView(values)));
  EXPECT_NE(copy, FloatVector(DType::float32, 3));
  EXPECT_TRUE(FloatVector().size() == 0);
  expect_error<QuantizationError>([] { FloatVector(DType::int8, 3); }, {"dtype", "int8"});
  expect_error<QuantizationError>([] { FloatVector(DType::float16, -1); }, {"size", "-1"});
  expect_error<QuantizationError>([] { FloatVector(ConstVectorView(nullptr, 3)); }, {"values is null"});
}

}  // namespace
}  // namespace bitcore
