// Scales and codes against their formulas in float64 or plain loops.
#include "bitcore/ops/base.h"

#include <cfenv>
#include <limits>

#include "bitcore/base/float_types-inl.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::bits_of;
using testing::Codes;
using testing::expect_error;
using testing::Floats;
using testing::random_floats;

// The fixed order of the contract, in its own words: blocks of 4,096, lane i mod 16, fold 16 to 1, again over the sums.
double slow_sum(std::vector<double> values) {
  while (true) {
    std::vector<double> sums;
    for (std::size_t begin = 0; begin < values.size(); begin += 4096) {
      std::vector<double> lanes(16, 0.0);
      for (std::size_t i = begin; i < std::min(values.size(), begin + 4096); ++i) lanes[(i - begin) % 16] += values[i];
      for (std::size_t half = 8; half >= 1; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      sums.push_back(lanes[0]);
    }
    if (sums.size() == 1) return sums[0];
    values = sums;
  }
}

float slow_weight_scale(const float* begin, std::int64_t count) {
  std::vector<double> magnitudes;
  for (std::int64_t i = 0; i < count; ++i) magnitudes.push_back(std::fabs(static_cast<double>(begin[i])));
  return std::max(static_cast<float>(slow_sum(magnitudes) / static_cast<double>(count)), 1e-5f);
}

TEST(WeightScale, FollowsTheFixedOrder) {
  ThreadPool two_threads(2);
  for (const auto& [rows, cols] : {std::pair<int, int>{1, 1}, {3, 5}, {16, 16}, {1, 4097}, {100, 999}, {70, 5000}}) {
    const Floats weight = random_floats(rows * cols, 3, 0.02f);
    const ConstMatrixView view(weight.data(), rows, cols);
    for (Executor* executor : {&serial_executor(), static_cast<Executor*>(&two_threads)}) {
      Floats scale(1);
      compute_weight_scale(view, {}, scale, *executor);
      EXPECT_EQ(scale[0], slow_weight_scale(weight.data(), rows * cols));
      Floats channel(static_cast<std::size_t>(rows));
      compute_weight_scale(view, {.weight_granularity = Granularity::per_channel}, channel, *executor);
      for (int row = 0; row < rows; ++row) {
        EXPECT_EQ(channel[static_cast<std::size_t>(row)], slow_weight_scale(weight.data() + row * cols, cols));
      }
    }
  }
}

TEST(WeightScale, OrderOfManyBlockSums) {
  // More than 4,096 blocks: the block sums themselves are cut into blocks.
  const std::int64_t count = 4097 * 4096 + 5;
  const Floats weight = random_floats(count, 4);
  EXPECT_EQ(compute_weight_scale({weight.data(), 1, count}, {})[0], slow_weight_scale(weight.data(), count));
}

TEST(WeightScale, StridedEqualsContiguous) {
  const Floats padded = random_floats(40 * 300, 5);
  Floats dense;
  for (int row = 0; row < 40; ++row)
    dense.insert(dense.end(), padded.begin() + row * 300, padded.begin() + row * 300 + 211);
  EXPECT_EQ(compute_weight_scale({padded.data(), DType::float32, 40, 211, 300}, {})[0],
            compute_weight_scale({dense.data(), 40, 211}, {})[0]);
}

TEST(WeightScale, FloorAndNonFinite) {
  Floats weight(40, 0.0f);
  EXPECT_EQ(compute_weight_scale({weight.data(), 4, 10}, {})[0], 1e-5f);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    weight[13] = bad;
    EXPECT_TRUE(std::isnan(compute_weight_scale({weight.data(), 4, 10}, {})[0]));
    const FloatVector channel =
        compute_weight_scale({weight.data(), 4, 10}, {.weight_granularity = Granularity::per_channel});
    EXPECT_EQ(channel[0], 1e-5f);
    EXPECT_TRUE(std::isnan(channel[1]));
  }
}

TEST(XScale, IsAbsmaxOver127) {
  Floats x = {0.5f, -3.0f, 2.0f, 0.0f, 1e-9f, -1e-9f};
  const BitQuantConfig per_tensor{.activation_granularity = Granularity::per_tensor};
  EXPECT_EQ(compute_x_scale({x.data(), 2, 3}, per_tensor), (Floats{3.0f / 127.0f}));
  const Floats rows = compute_x_scale({x.data(), 2, 3}, {});
  EXPECT_EQ(rows, (Floats{3.0f / 127.0f, 1e-5f / 127.0f}));
  EXPECT_EQ(compute_x_scale({x.data(), 2, 3}, {.activation_dtype = ActivationDtype::float32})[0], 1.0f);
  x[4] = -std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isnan(compute_x_scale({x.data(), 2, 3}, per_tensor)[0]));
}

TEST(Quantize, TiesGoToEven) {
  const Floats x = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f, 127.5f, -127.5f, -128.5f, 1e30f, -1e30f};
  const Codes expected = {0, 2, 2, 0, -2, -2, 126, 127, -128, -128, 127, -128};
  Codes codes(x.size());
  const Floats one = {1.0f};
  quantize_x({x.data(), 1, 12}, one, {}, {codes.data(), 1, 12});
  EXPECT_EQ(codes, expected);
  quantize_weight({x.data(), 1, 12}, one, {}, {codes.data(), 1, 12});
  EXPECT_EQ(codes, (Codes{0, 1, 1, 0, -1, -1, 1, 1, -1, -1, 1, -1}));
}

TEST(Quantize, EqualsTheFormula) {
  const Floats x = random_floats(20000, 6, 3.0f);
  const Floats scale = compute_x_scale({x.data(), 1, 20000}, {});
  Codes codes(x.size());
  quantize_x({x.data(), 1, 20000}, scale, {}, {codes.data(), 1, 20000});
  ASSERT_EQ(std::fegetround(), FE_TONEAREST);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float rounded = std::nearbyint(x[i] / scale[0]);
    EXPECT_EQ(codes[i], static_cast<std::int8_t>(std::min(127.0f, std::max(-128.0f, rounded))));
  }
}

TEST(Quantize, NaNBecomesZero) {
  const Floats x = {std::numeric_limits<float>::quiet_NaN(), 1.0f};
  Codes codes(2, 5);
  quantize_x({x.data(), 1, 2}, Floats{1.0f}, {}, {codes.data(), 1, 2});
  EXPECT_EQ(codes, (Codes{0, 1}));
  quantize_x({x.data(), 1, 2}, Floats{std::numeric_limits<float>::quiet_NaN()}, {}, {codes.data(), 1, 2});
  EXPECT_EQ(codes, (Codes{0, 0}));
}

TEST(Dequantize, InvertsTheScale) {
  const Codes codes = {-1, 0, 1, 1};
  Floats out(4);
  dequantize_weight({codes.data(), 2, 2}, Floats{0.5f, 2.0f}, {.weight_granularity = Granularity::per_channel},
                    {out.data(), 2, 2});
  EXPECT_EQ(out, (Floats{-0.5f, 0.0f, 2.0f, 2.0f}));
  dequantize_x({codes.data(), 2, 2}, Floats{3.0f}, {.activation_granularity = Granularity::per_tensor},
               {out.data(), 2, 2});
  EXPECT_EQ(out, (Floats{-3.0f, 0.0f, 3.0f, 3.0f}));
}

TEST(Errors, NameTheArgumentAndBothValues) {
  const Floats x(6, 1.0f);
  const Codes codes(6);
  Codes out(6);
  Floats floats(6);
  const MatrixView qx(out.data(), 2, 3);
  expect_error<QuantizationError>([&] { compute_weight_scale({codes.data(), 2, 3}, {}); }, {"weight", "int8"});
  expect_error<QuantizationError>([&] { compute_x_scale({codes.data(), 2, 3}, {}); }, {"x", "int8"});
  expect_error<QuantizationError>([&] { quantize_x({x.data(), 2, 3}, Floats{1}, {}, qx); }, {"scale", "1", "2"});
  expect_error<QuantizationError>([&] { quantize_weight({x.data(), 3, 2}, Floats{1}, {}, qx); }, {"(2, 3)", "(3, 2)"});
  expect_error<QuantizationError>(
      [&] {
        quantize_x({x.data(), 2, 3}, Floats{1}, {.activation_dtype = ActivationDtype::float32}, qx);
      },
      {"float32"});
  const std::vector<std::uint8_t> packed(6);
  expect_error<QuantizationError>(
      [&] {
        dequantize_weight({packed.data(), 2, 3}, Floats{1}, {}, {floats.data(), 2, 3});
      },
      {"unpack_weights"});
  expect_error<QuantizationError>([] { parse_granularity("per_row", "weight_granularity"); },
                                  {"weight_granularity", "per_channel", "per_row"});
  expect_error<QuantizationError>([] { parse_activation_dtype("int4", "activation_dtype"); },
                                  {"activation_dtype", "int8", "int4"});
}

// Every 16-bit pattern, and the values next to each rounding boundary.
TEST(FloatTypes, Float16ConvertsExactly) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = float16_to_float(half);
    const std::uint32_t exponent = (bits >> 10) & 31u;
    const std::uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_EQ(float_to_float16(value) & 0x7e00u, 0x7e00u);
      continue;
    }
    const double magnitude = exponent == 31  ? std::numeric_limits<double>::infinity()
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024.0 + mantissa, static_cast<int>(exponent) - 25);
    EXPECT_EQ(value, static_cast<float>(bits & 0x8000u ? -magnitude : magnitude));
    EXPECT_EQ(float_to_float16(value), half);
  }
}

TEST(FloatTypes, Float16RoundsToNearestEven) {
  for (std::uint16_t half = 0; half < 0x7c00u; ++half) {
    const float low = float16_to_float(half);
    const float high = half == 0x7bffu ? 65536.0f : float16_to_float(static_cast<std::uint16_t>(half + 1));
    const float middle = low + (high - low) / 2;
    const auto next = static_cast<std::uint16_t>(half + 1);
    EXPECT_EQ(float_to_float16(middle), half % 2 == 0 ? half : next);
    EXPECT_EQ(float_to_float16(std::nextafter(middle, 0.0f)), half);
    EXPECT_EQ(float_to_float16(std::nextafter(middle, 1e9f)), next);
  }
}

TEST(FloatTypes, BFloat16RoundsToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x7f80u; ++bits) {
    const auto low = static_cast<std::uint16_t>(bits);
    const auto next = static_cast<std::uint16_t>(bits + 1);
    EXPECT_EQ(float_to_bfloat16(bfloat16_to_float(low)), low);
    const std::uint32_t middle = bits << 16 | 0x8000u;
    EXPECT_EQ(float_to_bfloat16(std::bit_cast<float>(middle)), bits % 2 == 0 ? low : next);
    EXPECT_EQ(float_to_bfloat16(std::bit_cast<float>(middle - 1)), low);
    EXPECT_EQ(float_to_bfloat16(std::bit_cast<float>(middle + 1)), next);
  }
  EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(FloatTypes, ConvertCopiesRowsOfAnyDtype) {
  const Floats values = {1.0f, -2.5f, 1.00390625f, 70000.0f, std::numeric_limits<float>::quiet_NaN(), 0.0f};
  std::vector<std::uint16_t> narrow_rows(2 * 4, 0xabcd);  // rows of 3, 4 apart
  Floats back(6);
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    convert({values.data(), 2, 3}, {narrow_rows.data(), dtype, 2, 3, 4});
    convert({narrow_rows.data(), dtype, 2, 3, 4}, {back.data(), 2, 3});
    for (std::size_t i = 0; i < values.size(); ++i) {
      const bool is_bfloat16 = dtype == DType::bfloat16;
      const std::uint16_t bits = is_bfloat16 ? float_to_bfloat16(values[i]) : float_to_float16(values[i]);
      const float expected = is_bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
      EXPECT_EQ(narrow_rows[i / 3 * 4 + i % 3], bits);
      EXPECT_EQ(testing::bits_of({back[i]}), testing::bits_of({expected}));
    }
    EXPECT_EQ(narrow_rows[3], 0xabcd) << "wrote between rows";
  }
  testing::expect_error<QuantizationError>(
      [&] {
        convert({values.data(), 2, 3}, {back.data(), 3, 2});
      },
      {"to has shape (3, 2), expected (2, 3)"});
  const std::int8_t code = 0;
  testing::expect_error<QuantizationError>([&] { convert({&code, 1, 1}, {back.data(), 1, 1}); }, {"from", "int8"});
}

}  // namespace
}  // namespace bitcore
