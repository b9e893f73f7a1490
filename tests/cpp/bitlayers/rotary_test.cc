// The engine's own float64 functions, and rotary positions with every scaling, against long double.
#include "bitlayers/rotary.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "bitlayers/elementary64.h"

namespace bitlayers {
namespace {

constexpr long double kPi = 3.141592653589793238462643383279502884L;

double relative_error(double result, long double truth) {
  if (truth == 0) return result == 0 ? 0 : HUGE_VAL;
  return static_cast<double>(std::fabs((result - truth) / truth));
}

// Calls check(x) for many x of both signs, between magnitudes low and high: their logarithms are evenly spread.
template <class Check>
void for_magnitudes(double low, double high, const Check& check) {
  std::mt19937_64 engine(1);
  std::uniform_real_distribution<double> exponent(std::log(low), std::log(high));
  for (int i = 0; i < 100000; ++i) {
    const double x = std::exp(exponent(engine));
    check(x);
    check(-x);
  }
}

TEST(Elementary64, Exp) {
  for_magnitudes(1e-12, 700, [](double x) {
    ASSERT_LT(relative_error(exp64(x), std::exp(static_cast<long double>(x))), 3e-16) << x;
  });
  EXPECT_EQ(exp64(0.0), 1.0);
}

TEST(Elementary64, Log) {
  for_magnitudes(1e-300, 1e300, [](double x) {
    if (x < 0) return;
    ASSERT_LT(relative_error(log64(x), std::log(static_cast<long double>(x))), 3e-16) << x;
  });
  for_magnitudes(1e-15, 0.9, [](double x) {
    ASSERT_LT(relative_error(log64(1 + x), std::log(static_cast<long double>(1 + x))), 3e-16) << 1 + x;
  });
  EXPECT_EQ(log64(1.0), 0.0);
}

void check_sine_and_cosine(double x) {
  const long double sine = std::sin(static_cast<long double>(x)), cosine = std::cos(static_cast<long double>(x));
  ASSERT_LT(std::fabs(sin64(x) - sine), 4e-16 * std::fabs(sine) + 1e-25) << x;
  ASSERT_LT(std::fabs(cos64(x) - cosine), 4e-16 * std::fabs(cosine) + 1e-25) << x;
}

TEST(Elementary64, SineAndCosine) {
  for_magnitudes(1e-9, 0x1p24, check_sine_and_cosine);
  std::mt19937 engine(2);
  for (int i = 0; i < 100000; ++i) check_sine_and_cosine(engine() % (1 << 24));
  for (int i = 1; i < (1 << 23); i += 97) check_sine_and_cosine(i * 1.5707963267948966);  // next to the zeros
  EXPECT_EQ(sin64(0.0), 0.0);
  EXPECT_EQ(cos64(0.0), 1.0);
}

// ---- rotary

constexpr std::int64_t kHeadDim = 96, kPairs = kHeadDim / 2, kMaxPositions = 131072;
constexpr double kTheta = 500000.0;

long double true_power(std::int64_t pair) { return std::pow(static_cast<long double>(kTheta), 2.0L * pair / kHeadDim); }

// Frequencies that `expected` gives for each pair, and the factor on cosines and sines.
template <class Expected>
void check_rotary(const RotaryScaling& scaling, std::int64_t context_limit, long double factor,
                  const Expected& expected) {
  const Rotary rotary(kHeadDim, kTheta, scaling, context_limit, kMaxPositions);
  EXPECT_LT(relative_error(rotary.attention_factor(), factor), 1e-14);
  ASSERT_EQ(rotary.frequencies().size(), static_cast<std::size_t>(kPairs));
  for (std::int64_t pair = 0; pair < kPairs; ++pair) {
    ASSERT_LT(relative_error(rotary.frequencies()[static_cast<std::size_t>(pair)], expected(pair)), 1e-14) << pair;
  }
  for (const std::int64_t position : {0, 1, 255, 4095, 131071}) {
    std::vector<float> cosines(kPairs + 1, 7.0f), sines = cosines;
    rotary.cosines_and_sines(position, cosines.data(), sines.data());
    EXPECT_EQ(cosines.back(), 7.0f);
    EXPECT_EQ(sines.back(), 7.0f);
    for (std::int64_t pair = 0; pair < kPairs; ++pair) {
      const long double angle = position * expected(pair);
      // Half a unit of a float32 next to the factor, and what the float64 angle lacks.
      const long double rounding = factor > 1 ? 0x1p-24L : 0x1p-25L;
      const auto tolerance = static_cast<double>(rounding + factor * (angle * 1e-14L + 1e-15L));
      const auto index = static_cast<std::size_t>(pair);
      ASSERT_NEAR(cosines[index], static_cast<double>(factor * std::cos(angle)), tolerance) << position << ", " << pair;
      ASSERT_NEAR(sines[index], static_cast<double>(factor * std::sin(angle)), tolerance) << position << ", " << pair;
    }
  }
}

using Kind = RotaryScaling::Kind;

TEST(Rotary, Unscaled) {
  check_rotary({}, 4096, 1, [](std::int64_t pair) { return 1 / true_power(pair); });
}

TEST(Rotary, Linear) {
  RotaryScaling scaling{.kind = Kind::linear, .factor = 4};
  check_rotary(scaling, 4096, 1, [](std::int64_t pair) { return 1 / true_power(pair) / 4; });
}

TEST(Rotary, Llama3) {
  const RotaryScaling scaling{
      .kind = Kind::llama3, .factor = 8, .low_freq_factor = 1, .high_freq_factor = 4, .original_context = 8192};
  int kept = 0, mixed = 0, divided = 0;
  check_rotary(scaling, 4096, 1, [&](std::int64_t pair) {
    const long double frequency = 1 / true_power(pair), rotations = 8192 * frequency / (2 * kPi);
    if (rotations > 4) return ++kept, frequency;
    if (rotations < 1) return ++divided, frequency / 8;
    const long double smooth = (rotations - 1) / 3;
    return ++mixed, (1 - smooth) * frequency / 8 + smooth * frequency;
  });
  EXPECT_TRUE(kept > 0 && mixed > 0 && divided > 0);
}

long double yarn_frequency(std::int64_t pair, double factor, double fast, double slow, bool truncate) {
  const auto bound = [](double rotations) {
    return kHeadDim * std::log(4096 / (rotations * 2 * kPi)) / (2 * std::log(static_cast<long double>(kTheta)));
  };
  const long double low = truncate ? std::floor(bound(fast)) : bound(fast);
  const long double high = truncate ? std::ceil(bound(slow)) : bound(slow);
  const long double divided = std::clamp((pair - low) / (high - low), 0.0L, 1.0L);
  return (1 - divided) / true_power(pair) + divided / (factor * true_power(pair));
}

TEST(Rotary, Yarn) {
  RotaryScaling scaling{.kind = Kind::yarn, .factor = 16, .original_context = 4096};
  const auto expected = [](std::int64_t pair) { return yarn_frequency(pair, 16, 32, 1, true); };
  check_rotary(scaling, 4096, 0.1L * std::log(16.0L) + 1, expected);
  scaling.mscale = 0.7;
  check_rotary(scaling, 4096, 0.1L * std::log(16.0L) + 1, expected);
  scaling.mscale_all_dim = 1.2;
  check_rotary(scaling, 4096, (0.07L * std::log(16.0L) + 1) / (0.12L * std::log(16.0L) + 1), expected);
  scaling.attention_factor = 1.5;
  check_rotary(scaling, 4096, 1.5L, expected);
}

TEST(Rotary, YarnWithOtherBounds) {
  RotaryScaling scaling{.kind = Kind::yarn, .original_context = 4096, .beta_fast = 20, .beta_slow = 2};
  scaling.truncate = false;
  check_rotary(scaling, 4096, 0.1L * std::log(32.0L) + 1,  // 131072 / 4096
               [](std::int64_t pair) { return yarn_frequency(pair, 32, 20, 2, false); });
}

TEST(Rotary, Longrope) {
  RotaryScaling scaling{.kind = Kind::longrope, .original_context = 4096};
  for (std::int64_t pair = 0; pair < kPairs; ++pair) {
    scaling.short_factors.push_back(1 + pair * 0.01);
    scaling.long_factors.push_back(1 + pair * 1.5);
  }
  const auto with_short = [](std::int64_t pair) { return 1 / ((1 + pair * 0.01) * true_power(pair)); };
  const auto with_long = [](std::int64_t pair) { return 1 / ((1 + pair * 1.5) * true_power(pair)); };
  const long double factor = std::sqrt(1 + std::log(32.0L) / std::log(4096.0L));
  check_rotary(scaling, 4096, factor, with_short);
  check_rotary(scaling, 4097, factor, with_long);
  scaling.factor = 0.5;
  check_rotary(scaling, 4097, 1, with_long);
  scaling.attention_factor = 1.25;
  check_rotary(scaling, 1, 1.25L, with_short);
}

}  // namespace
}  // namespace bitlayers
