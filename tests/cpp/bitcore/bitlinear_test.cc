// prepare_weights and forward as a user calls them: values against plain formulas, and every documented error.
#include "bitcore/ops/bitlinear.h"

#include <limits>

#include "bitcore/ops/base.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::bits_of;
using testing::Codes;
using testing::expect_error;
using testing::Floats;
using testing::random_floats;

constexpr std::int64_t kOut = 19, kIn = 45, kTokens = 6;

struct Data {
  Floats x = random_floats(kTokens * kIn, 1);
  Floats weight = random_floats(kOut * kIn, 2, 0.05f);
  Floats bias = random_floats(kOut, 3);
  Floats y = Floats(kTokens * kOut);

  ConstMatrixView x_view() const { return {x.data(), kTokens, kIn}; }
  ConstMatrixView weight_view() const { return {weight.data(), kOut, kIn}; }
  ConstVectorView bias_view() const { return {bias.data(), kOut}; }
  MatrixView y_view() { return {y.data(), kTokens, kOut}; }
};

TEST(PrepareWeights, EqualsScaleQuantizePack) {
  const Data data;
  ThreadPool two_threads(2);
  for (const BitQuantConfig& config : all_configs()) {
    const auto prepared = bitlinear::prepare_weights(data.weight_view(), config);
    EXPECT_EQ(prepared.scale, compute_weight_scale(data.weight_view(), config));
    Codes codes(data.weight.size());
    quantize_weight(data.weight_view(), prepared.scale, config, {codes.data(), kOut, kIn});
    EXPECT_EQ(prepared.qweight, pack_weights({codes.data(), kOut, kIn}));
    EXPECT_EQ(bitlinear::prepare_weights(data.weight_view(), config, Layout::two_bit, two_threads).qweight,
              prepared.qweight);
  }
}

// Comparison with half the scale must agree with division and rounding, at the ties and next to them.
TEST(PrepareWeights, ComparisonEqualsDivision) {
  std::mt19937 engine(4);
  std::uniform_real_distribution<float> uniform(1e-5f, 1.0f);
  for (int trial = 0; trial < 2000; ++trial) {
    const float scale = trial == 0 ? 1e-5f : uniform(engine);
    const float half = 0.5f * scale;
    for (const float w : {half, std::nextafter(half, 1.0f), std::nextafter(half, 0.0f), -half,
                          std::nextafter(-half, -1.0f), 1.5f * scale}) {
      const int by_division = static_cast<int>(std::min(1.0f, std::max(-1.0f, std::nearbyint(w / scale))));
      EXPECT_EQ((w > half) - (w < -half), by_division) << scale << " " << w;
    }
  }
}

TEST(Forward, IsTheFormula) {
  Data data;
  for (const BitQuantConfig& config : all_configs()) {
    const auto prepared = bitlinear::prepare_weights(data.weight_view(), config);
    bitlinear::forward(data.x_view(), prepared, data.bias_view(), config, data.y_view());
    Codes qw(data.weight.size()), qx(data.x.size());
    quantize_weight(data.weight_view(), prepared.scale, config, {qw.data(), kOut, kIn});
    const Floats x_scale = compute_x_scale(data.x_view(), config);
    if (config.activation_dtype == ActivationDtype::int8) {
      quantize_x(data.x_view(), x_scale, config, {qx.data(), kTokens, kIn});
    }
    for (std::int64_t m = 0; m < kTokens; ++m) {
      for (std::int64_t n = 0; n < kOut; ++n) {
        const bool grouped = config.weight_granularity == Granularity::per_group;
        const std::int64_t group_size = grouped ? config.group_size : kIn, groups = (kIn + group_size - 1) / group_size;
        const bool x_grouped = config.activation_granularity == Granularity::per_group;
        float product = 0.0f;
        for (std::int64_t group = 0; group < groups; ++group) {
          double sum = 0.0;
          for (std::int64_t k = group * group_size; k < std::min(kIn, (group + 1) * group_size); ++k) {
            const auto i = static_cast<std::size_t>(m * kIn + k);
            const double activation = config.activation_dtype == ActivationDtype::int8 ? qx[i] : data.x[i];
            sum += activation * qw[static_cast<std::size_t>(n * kIn + k)];
          }
          const std::int64_t x_index = x_scale.size() == 1 ? 0 : x_grouped ? m * groups + group : m;
          const std::int64_t w_index = prepared.scale.size() == 1 ? 0 : n * groups + group;
          const float term =
              static_cast<float>(sum) * (x_scale[static_cast<std::size_t>(x_index)] * prepared.scale[w_index]);
          product = grouped ? product + term : term;
        }
        const float expected = product + data.bias[static_cast<std::size_t>(n)];
        const float got = data.y[static_cast<std::size_t>(m * kOut + n)];
        if (config.activation_dtype == ActivationDtype::int8) {
          EXPECT_EQ(got, expected);
        } else {
          EXPECT_NEAR(got, expected, 1e-5f);
        }
      }
    }
  }
}

TEST(Forward, TakesPlainCodes) {
  Data data;
  const BitQuantConfig config;
  const auto prepared = bitlinear::prepare_weights(data.weight_view(), config);
  Codes codes(data.weight.size());
  unpack_weights(prepared.view(), {codes.data(), kOut, kIn});
  bitlinear::forward(data.x_view(), prepared, {}, config, data.y_view());
  Floats y(data.y.size());
  bitlinear::forward(data.x_view(), prepared.scale, {codes.data(), kOut, kIn}, {}, config, {y.data(), kTokens, kOut});
  EXPECT_EQ(y, data.y);
}

TEST(Forward, TrainingEqualsInference) {
  Data data;
  for (const BitQuantConfig& config : all_configs()) {
    const auto prepared = bitlinear::prepare_weights(data.weight_view(), config);
    bitlinear::forward(data.x_view(), prepared, data.bias_view(), config, data.y_view());
    Floats y(data.y.size());
    const auto saved = bitlinear::forward_training(data.x_view(), data.weight_view(), data.bias_view(), config,
                                                   {y.data(), kTokens, kOut});
    EXPECT_EQ(bits_of(y), bits_of(data.y));
    EXPECT_EQ(saved.weights.qweight, prepared.qweight);
  }
}

TEST(Forward, NonFiniteWeightTrainsToNaN) {
  Data data;
  data.weight[3] = std::numeric_limits<float>::infinity();
  for (const BitQuantConfig& config : all_configs()) {
    bitlinear::forward_training(data.x_view(), data.weight_view(), {}, config, data.y_view());
    const bool tensor = config.weight_granularity == Granularity::per_tensor;
    for (std::size_t i = 0; i < data.y.size(); ++i) EXPECT_EQ(std::isnan(data.y[i]), tensor || i % kOut == 0);
    expect_error<QuantizationError>([&] { bitlinear::prepare_weights(data.weight_view(), config); },
                                    {"weight", "NaN", "infinity"});
  }
}

TEST(Forward, Errors) {
  Data data;
  const BitQuantConfig config;
  const auto prepared = bitlinear::prepare_weights(data.weight_view(), config);
  const auto run = [&](ConstMatrixView x, ConstVectorView scale, ConstMatrixView qweight, ConstVectorView bias) {
    return [=, &data, &config] { bitlinear::forward(x, scale, qweight, bias, config, data.y_view()); };
  };
  expect_error<QuantizationError>(run({data.x.data(), kTokens, kIn - 1}, prepared.scale, prepared.view(), {}),
                                  {"x has 44 features", "qweight expects 45"});
  const Codes codes(kTokens * kIn);
  expect_error<QuantizationError>(run({codes.data(), kTokens, kIn}, prepared.scale, prepared.view(), {}),
                                  {"x must be", "int8"});
  expect_error<QuantizationError>(run(data.x_view(), Floats{1, 2}, prepared.view(), {}), {"qweight_scale", "2", "1"});
  for (const float bad :
       {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const Floats scale = {bad};
    expect_error<QuantizationError>(run(data.x_view(), scale, prepared.view(), {}), {"qweight_scale", "positive"});
  }
  expect_error<QuantizationError>(run(data.x_view(), prepared.scale, prepared.view(), {data.bias.data(), kOut - 1}),
                                  {"bias has 18", "19"});
  expect_error<QuantizationError>(run(data.x_view(), prepared.scale, data.weight_view(), {}), {"qweight", "float32"});
  expect_error<QuantizationError>(
      [&] {
        bitlinear::forward(data.x_view(), prepared, {}, config, {data.y.data(), kTokens, kOut - 1});
      },
      {"y has shape (6, 18)", "(6, 19)"});
  const Floats channel(kOut, 1.0f);
  expect_error<QuantizationError>(run(data.x_view(), channel, prepared.view(), {}),
                                  {"qweight_scale has 19", "expects 1"});
}

TEST(Forward, FourThreadsShareWeights) {
  const Data data;
  const BitQuantConfig config;
  const auto prepared = bitlinear::prepare_weights(data.weight_view(), config);
  std::vector<Floats> results(4, Floats(data.y.size()));
  std::vector<std::thread> threads;
  for (Floats& y : results) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 50; ++repeat) {
        bitlinear::forward(data.x_view(), prepared, data.bias_view(), config, {y.data(), kTokens, kOut});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Floats& y : results) EXPECT_EQ(y, results[0]);
}

}  // namespace
}  // namespace bitcore
