// The row functions and code rows of every instruction set of this CPU against plain definitions, bit for bit.
#include "bitcore/quantize/row_functions.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "bitcore/base/cpu_features.h"
#include "bitcore/packing/code_rows.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::Floats;
using testing::random_floats;

struct Named {
  const char* name;
  const RowFunctions& functions;
};

std::vector<Named> all_functions() {
  std::vector<Named> all = {{"portable", kPortableRowFunctions}};
#if defined(__x86_64__)
  if (cpu_has_avx2()) all.push_back({"AVX2", kAvx2RowFunctions});
  if (cpu_has_avx512()) all.push_back({"AVX-512", kAvx512RowFunctions});
#endif
  return all;
}

struct NamedCodeRows {
  const char* name;
  const CodeRows& functions;
};

std::vector<NamedCodeRows> all_code_rows() {
  std::vector<NamedCodeRows> all = {{"portable", kPortableCodeRows}};
#if defined(__x86_64__)
  if (cpu_has_avx2()) all.push_back({"AVX2", kAvx2CodeRows});
  if (cpu_has_avx512()) all.push_back({"AVX-512", kAvx512CodeRows});
#endif
  return all;
}

const std::int64_t kCounts[] = {0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 333, 4095, 4096};

double slow_sum(const Floats& values) {
  double lanes[16] = {};
  for (std::size_t i = 0; i < values.size(); ++i) lanes[i % 16] += std::fabs(static_cast<double>(values[i]));
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Every float16 there is, in matrices of odd and even sizes, next to rows and groups that are not to be written.
TEST(RowFunctions, TransposeScales) {
  for (const Named& named : all_functions()) {
    for (const std::int64_t rows : {1, 7, 15, 16}) {
      for (const std::int64_t groups : {1, 7, 8, 9, 32, 100}) {
        SCOPED_TRACE(std::string(named.name) + " " + std::to_string(rows) + " x " + std::to_string(groups));
        const std::int64_t row_step = groups + 3, out_stride = 48;
        for (std::uint32_t first = 0; first < 65536; first += static_cast<std::uint32_t>(rows * groups)) {
          std::vector<std::uint16_t> bits(static_cast<std::size_t>(rows * row_step), 0);  // what lies between is 0
          bool unusable = false;
          for (std::int64_t i = 0; i < rows * groups; ++i) {
            const std::uint32_t value = first + static_cast<std::uint32_t>(i);
            const auto half = static_cast<std::uint16_t>(value < 65536 ? value : 0x3c00);
            bits[static_cast<std::size_t>(i / groups * row_step + i % groups)] = half;
            unusable |= half == 0 || half >= 0x7c00;
          }
          const auto size = static_cast<std::int64_t>(bits.size());
          const Floats wide = testing::floats_of(FloatVector(ConstVectorView(bits.data(), DType::float16, size)));
          Floats expected(static_cast<std::size_t>(groups * out_stride), 5.0f), out = expected;
          for (std::int64_t i = 0; i < rows * groups; ++i) {
            expected[static_cast<std::size_t>(i % groups * out_stride + i / groups)] =
                wide[static_cast<std::size_t>(i / groups * row_step + i % groups)];
          }
          const std::uint32_t found =
              named.functions.transpose_scales(bits.data(), row_step, rows, groups, out.data(), out_stride);
          ASSERT_EQ(found != 0, unusable) << first;
          ASSERT_EQ(testing::bits_of(out), testing::bits_of(expected)) << first;
        }
      }
    }
  }
}

TEST(RowFunctions, AbsoluteSum) {
  for (const Named& named : all_functions()) {
    for (const std::int64_t count : kCounts) {
      // Magnitudes far apart: another order would give other bits.
      Floats values = random_floats(count, 1);
      for (std::size_t i = 0; i < values.size(); ++i) values[i] *= i % 3 == 0 ? 1e8f : 1e-3f;
      EXPECT_EQ(named.functions.absolute_sum(values.data(), count), slow_sum(values)) << named.name << " " << count;
    }
    const Floats bad = {1.0f, -std::numeric_limits<float>::infinity(), std::nanf("")};
    EXPECT_TRUE(std::isnan(named.functions.absolute_sum(bad.data(), 3)));
    EXPECT_TRUE(std::isinf(named.functions.absolute_sum(bad.data(), 2)));
  }
}

TEST(RowFunctions, AbsmaxAndCodes) {
  for (const Named& named : all_functions()) {
    for (const std::int64_t count : kCounts) {
      Floats x = random_floats(count, 2);
      if (count > 3) x[static_cast<std::size_t>(count) - 2] = -7.25f;
      float largest = 0.0f;
      for (const float value : x) largest = std::max(largest, std::fabs(value));
      EXPECT_EQ(named.functions.absmax(x.data(), count), std::bit_cast<std::uint32_t>(largest)) << named.name;

      const float scale = std::max(largest, 1e-5f) / 127.0f;
      if (count > 5) x[4] = 0.5f * scale, x[5] = -2.5f * scale;  // ties
      std::vector<std::int8_t> codes(x.size() + 1, 99);
      std::int32_t sum = 0;
      for (const float value : x) sum += static_cast<int>(std::nearbyint(value / scale));
      EXPECT_EQ(named.functions.quantize_x(x.data(), count, scale, codes.data()), sum) << named.name << " " << count;
      for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(codes[i], static_cast<int>(std::nearbyint(x[i] / scale)));
      EXPECT_EQ(codes.back(), 99) << "written past the end";
    }
    const Floats bad = {1.0f, std::nanf(""), 2.0f};
    EXPECT_GE(named.functions.absmax(bad.data(), 3), 0x7f800000u);
    std::int8_t codes[3] = {9, 9, 9};
    EXPECT_EQ(named.functions.quantize_x(bad.data(), 3, std::nanf(""), codes), 0);
    EXPECT_TRUE(codes[0] == 0 && codes[1] == 0 && codes[2] == 0);
  }
}

TEST(RowFunctions, CodesOfAnyScale) {
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  const Floats pattern = {127.4f, 127.6f, 1e30f, infinity, -127.6f, -128.4f, -129.0f, -1e30f, -infinity, nan, 3.0f};
  const std::int8_t expected[] = {127, 127, 127, 127, -128, -128, -128, -128, -128, 0, 3};
  for (const Named& named : all_functions()) {
    for (const std::int64_t count : kCounts) {
      Floats x;
      for (std::int64_t i = 0; i < count; ++i) x.push_back(pattern[static_cast<std::size_t>(i) % pattern.size()]);
      std::vector<std::int8_t> codes(x.size() + 1, 99);
      std::int32_t sum = 0;
      const std::int32_t found = named.functions.quantize_x(x.data(), count, 1.0f, codes.data());
      for (std::size_t i = 0; i < x.size(); ++i) {
        EXPECT_EQ(codes[i], expected[i % pattern.size()]) << named.name << " " << x[i];
        sum += codes[i];
      }
      EXPECT_EQ(found, sum) << named.name << " " << count;
      EXPECT_EQ(codes.back(), 99) << "written past the end";
    }
    const Floats x = {0.0f, 1.0f, -1.0f};
    std::int8_t codes[3];
    EXPECT_EQ(named.functions.quantize_x(x.data(), 3, 0.0f, codes), -1) << named.name;
    EXPECT_TRUE(codes[0] == 0 && codes[1] == 127 && codes[2] == -128) << named.name;
  }
}

TEST(RowFunctions, TernaryCodes) {
  for (const Named& named : all_functions()) {
    for (const std::int64_t count : kCounts) {
      Floats weight = random_floats(count, 3);
      const float half = 0.4f;
      if (count > 6) {
        weight[0] = half, weight[1] = -half;  // ties go to 0
        weight[2] = std::nextafter(half, 1.0f), weight[3] = std::nextafter(-half, -1.0f);
        weight[4] = std::nanf(""), weight[5] = -0.0f;
      }
      std::vector<std::uint8_t> codes(weight.size() + 1, 77);
      named.functions.ternary_codes(weight.data(), count, half, codes.data());
      for (std::size_t i = 0; i < weight.size(); ++i) {
        EXPECT_EQ(codes[i], weight[i] > half ? 2 : weight[i] < -half ? 0 : 1) << named.name << " " << i;
      }
      EXPECT_EQ(codes.back(), 77) << "written past the end";
    }
  }
}

TEST(CodeRows, PackedWords) {
  std::mt19937 engine(4);
  for (const NamedCodeRows& named : all_code_rows()) {
    for (const std::int64_t steps : {0, 1, 2, 7, 33}) {
      std::vector<std::uint8_t> codes(static_cast<std::size_t>(steps * 20));
      for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(engine() % 3);
      for (const std::int64_t stride : {4, 64}) {
        std::vector<std::uint8_t> two_bit(static_cast<std::size_t>(steps * stride)), base3(two_bit.size());
        named.functions.pack_two_bit(codes.data(), steps, two_bit.data(), stride);
        named.functions.pack_base3(codes.data(), steps, base3.data(), stride);
        for (std::int64_t step = 0; step < steps; ++step) {
          for (int byte = 0; byte < 4; ++byte) {
            int four = 0, five = 0;
            for (int f = 3; f >= 0; --f) four = 4 * four + codes[static_cast<std::size_t>(16 * step + 4 * f + byte)];
            for (int f = 4; f >= 0; --f) five = 3 * five + codes[static_cast<std::size_t>(20 * step + 4 * f + byte)];
            EXPECT_EQ(two_bit[static_cast<std::size_t>(step * stride + byte)], four) << named.name;
            EXPECT_EQ(base3[static_cast<std::size_t>(step * stride + byte)], five) << named.name;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitcore
