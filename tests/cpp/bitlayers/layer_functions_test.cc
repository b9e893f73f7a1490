// The operations of a language model on every instruction set of this CPU, bit for bit against the plain loops, and
// those against long double.
#include "bitlayers/layer_functions.h"

#include <cmath>
#include <functional>
#include <limits>

#include "../bitcore/support.h"
#include "bitcore/base/float_types-inl.h"
#include "bitcore/ops/packing.h"
#include "bitlayers/ternary_embedding.h"

namespace bitlayers {
namespace {

using bitcore::DType;
using bitcore::testing::bits_of;
using bitcore::testing::Floats;
using bitcore::testing::random_floats;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kSmallest = std::numeric_limits<float>::denorm_min();

std::vector<std::int64_t> counts() {
  std::vector<std::int64_t> all = {127, 128, 333, 2559, 2560, 2561};
  for (std::int64_t count = 1; count <= 70; ++count) all.push_back(count);
  return all;
}

const Floats& extremes() {
  static const Floats values = {0.0f,       -0.0f,      1.0f,    -1.0f,   0.625f,  -0.625f,     kSmallest,
                                -kSmallest, 1e-40f,     -1e-39f, 1e-30f,  -1e-30f, 87.0f,       -87.0f,
                                -87.0001f,  88.72f,     88.73f,  -100.0f, 5.0f,    -6.0f,       10.0f,
                                -10.5f,     1e19f,      -1e20f,  3e38f,   -3e38f,  kLargest,    kNan,
                                kInfinity,  -kInfinity, -kNan,   3.9f,    4.1f,    0.99999994f, 1.0000001f};
  return values;
}

// Ordinary values; with `seed` odd also extreme ones among them.
Floats test_floats(std::int64_t count, unsigned seed) {
  Floats values = random_floats(count, seed, 2.0f);
  if (seed % 2 == 1) {
    for (std::size_t i = seed % 5; i < values.size(); i += 5) values[i] = extremes()[(i + seed) % extremes().size()];
  }
  return values;
}

// Calls check(path's functions) for each but the reference.
void on_every_path(const std::function<void(const LayerFunctions&)>& check) {
  for (const Path path : supported_paths()) {
    if (path == Path::reference) continue;
    SCOPED_TRACE(to_string(path));
    check(layer_functions(path));
    if (::testing::Test::HasFailure()) return;
  }
}

const LayerFunctions& reference() { return layer_functions(Path::reference); }

// Outputs lie before floats that are not to be written.
constexpr std::size_t kGuard = 20;
Floats guarded(const Floats& values) {
  Floats with_guard = values;
  with_guard.resize(values.size() + kGuard, -77.0f);
  return with_guard;
}
Floats empty(std::int64_t count) { return guarded(Floats(static_cast<std::size_t>(count), 5.0f)); }

// Calls run(functions, count, seed) and compares what it returns.
void compare_rows(const std::function<Floats(const LayerFunctions&, std::int64_t, unsigned)>& run) {
  for (const std::int64_t count : counts()) {
    for (const unsigned seed : {2u, 3u, 5u}) {
      const auto expected = bits_of(run(reference(), count, seed));
      on_every_path([&](const LayerFunctions& functions) {
        EXPECT_EQ(bits_of(run(functions, count, seed)), expected) << "count " << count << ", seed " << seed;
      });
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TEST(LayerFunctions, RmsNorm) {
  compare_rows([](const LayerFunctions& f, std::int64_t count, unsigned seed) {
    Floats y = empty(count);
    f.rms_norm(test_floats(count, seed).data(), random_floats(count, 9).data(), count, 1e-5f, y.data());
    return y;
  });
  compare_rows([](const LayerFunctions& f, std::int64_t count, unsigned) {  // in place
    Floats y = guarded(test_floats(count, 4));
    f.rms_norm(y.data(), random_floats(count, 9).data(), count, 1e-6f, y.data());
    return y;
  });
}

TEST(LayerFunctions, RmsNormOfZerosAndTinyAndHugeRows) {
  for (const float value : {0.0f, kSmallest, 1e-30f, 1e19f, 1e20f}) {
    compare_rows([&](const LayerFunctions& f, std::int64_t count, unsigned) {
      const Floats x(static_cast<std::size_t>(count), value);
      Floats y = empty(count);
      f.rms_norm(x.data(), x.data(), count, 1e-6f, y.data());
      return y;
    });
  }
}

TEST(LayerFunctions, Rotate) {
  compare_rows([](const LayerFunctions& f, std::int64_t half, unsigned seed) {
    Floats x = guarded(test_floats(2 * half, seed));
    f.rotate(x.data(), random_floats(half, 7).data(), test_floats(half, 8).data(), half);
    return x;
  });
}

TEST(LayerFunctions, AddScaledAndScale) {
  for (const float factor : {0.3f, -1.0f, 0.0f, kNan, 1e38f}) {
    compare_rows([&](const LayerFunctions& f, std::int64_t count, unsigned seed) {
      Floats h = guarded(test_floats(count, seed + 1));
      f.add_scaled(test_floats(count, seed).data(), factor, count, h.data());
      f.scale(factor, count, h.data());
      return h;
    });
  }
}

constexpr Activation kActivations[] = {Activation::silu, Activation::relu2, Activation::gelu, Activation::gelu_tanh};

TEST(LayerFunctions, Activate) {
  for (const Activation activation : kActivations) {
    SCOPED_TRACE(static_cast<int>(activation));
    compare_rows([&](const LayerFunctions& f, std::int64_t count, unsigned seed) {
      Floats out = empty(count);
      f.activate(activation, test_floats(count, seed).data(), test_floats(count, seed + 2).data(), count, out.data());
      Floats gate = guarded(test_floats(count, seed));
      f.activate(activation, gate.data(), test_floats(count, 6).data(), count, gate.data());
      out.insert(out.end(), gate.begin(), gate.end());
      Floats up = guarded(test_floats(count, seed));
      f.activate(activation, test_floats(count, 6).data(), up.data(), count, up.data());
      out.insert(out.end(), up.begin(), up.end());
      return out;
    });
  }
}

using ElementFunction = void (*LayerFunctions::*)(const float*, std::int64_t, float*);
constexpr ElementFunction kElementFunctions[] = {&LayerFunctions::exp, &LayerFunctions::erf, &LayerFunctions::tanh};

TEST(LayerFunctions, ExpErfTanhOfRows) {
  for (const ElementFunction function : kElementFunctions) {
    compare_rows([&](const LayerFunctions& f, std::int64_t count, unsigned seed) {
      Floats out = empty(count);
      (f.*function)(test_floats(count, seed).data(), count, out.data());
      return out;
    });
  }
}

// Floats of all exponents and both signs, `step` apart in their bits.
Floats floats_over_the_range(std::uint32_t step) {
  Floats values = extremes();
  for (std::uint32_t bits = 0; bits <= 0x7f800000u - step; bits += step) {
    values.push_back(std::bit_cast<float>(bits));
    values.push_back(std::bit_cast<float>(bits | 0x80000000u));
  }
  return values;
}

TEST(LayerFunctions, ElementFunctionsOverTheRangeOfFloats) {
  const Floats in = floats_over_the_range(20011);
  const auto count = static_cast<std::int64_t>(in.size());
  const Floats ones(in.size(), 1.0f);
  const auto outputs = [&](const LayerFunctions& f) {
    Floats all, out(in.size());
    for (const ElementFunction function : kElementFunctions) {
      (f.*function)(in.data(), count, out.data());
      all.insert(all.end(), out.begin(), out.end());
    }
    for (const Activation activation : kActivations) {
      f.activate(activation, in.data(), ones.data(), count, out.data());
      all.insert(all.end(), out.begin(), out.end());
    }
    return bits_of(all);
  };
  const auto expected = outputs(reference());
  on_every_path([&](const LayerFunctions& f) { EXPECT_TRUE(outputs(f) == expected); });
}

// ---- accuracy

// Distance of a result from the true value in units of the float32 that the true value rounds to.
double ulps(float result, long double truth) {
  const float nearest = static_cast<float>(truth);
  if (std::isnan(nearest) || std::isinf(nearest) || std::isinf(result)) {
    return bits_of({result}) == bits_of({nearest}) ? 0.0 : HUGE_VAL;
  }
  const int exponent = std::max(nearest == 0.0f ? -149 : std::ilogb(nearest) - 23, -149);
  return static_cast<double>(std::fabs(std::ldexp(static_cast<long double>(result) - truth, -exponent)));
}

Floats floats_within(float low, float high, std::uint32_t step) {
  Floats values;
  for (const float value : floats_over_the_range(step)) {
    if (value >= low && value <= high) values.push_back(value);
  }
  return values;
}

double worst_ulps(ElementFunction function, const Floats& in, long double (*truth)(long double)) {
  Floats out(in.size());
  (layer_functions(supported_paths().front()).*function)(in.data(), static_cast<std::int64_t>(in.size()), out.data());
  double worst = 0.0;
  for (std::size_t i = 0; i < in.size(); ++i) worst = std::max(worst, ulps(out[i], truth(in[i])));
  return worst;
}

TEST(LayerFunctions, AccuracyOfExpErfTanh) {
  const Floats all = floats_within(-kLargest, kLargest, 50021);
  EXPECT_LT(worst_ulps(&LayerFunctions::erf, all, std::erf), 1.25);
  EXPECT_LT(worst_ulps(&LayerFunctions::tanh, all, std::tanh), 1.5);
  EXPECT_LT(worst_ulps(&LayerFunctions::exp, floats_within(-87.0f, 88.72f, 50021), std::exp), 1.0);
}

double worst_error(Activation activation, float low, float high, long double (*truth)(long double), bool relative) {
  const Floats in = floats_within(low, high, 50021), ones(in.size(), 1.0f);
  Floats out(in.size());
  const auto count = static_cast<std::int64_t>(in.size());
  layer_functions(supported_paths().front()).activate(activation, in.data(), ones.data(), count, out.data());
  double worst = 0.0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    const long double value = truth(in[i]);
    const auto error = static_cast<double>(std::fabs(out[i] - value) / std::max(1.0L, std::fabs(value)));
    worst = std::max(worst, relative ? ulps(out[i], value) : error);
  }
  return worst;
}

long double true_silu(long double x) { return x / (1 + std::exp(-x)); }
long double true_gelu(long double x) { return x / 2 * std::erfc(-x / std::sqrt(2.0L)); }
long double true_gelu_tanh(long double x) {
  return x / 2 * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846L) * (x + 0.044715L * x * x * x)));
}

// gelu's formula cancels for negative x: there the error is small only compared with 1.
TEST(LayerFunctions, AccuracyOfActivations) {
  EXPECT_LT(worst_error(Activation::silu, -87.0f, kLargest, true_silu, true), 2.5);
  EXPECT_LT(worst_error(Activation::gelu, -0.5f, kLargest, true_gelu, true), 4.0);
  EXPECT_LT(worst_error(Activation::gelu_tanh, -0.5f, kLargest, true_gelu_tanh, true), 5.0);
  EXPECT_LT(worst_error(Activation::gelu, -100.0f, 100.0f, true_gelu, false), 0x1p-22);
  EXPECT_LT(worst_error(Activation::gelu_tanh, -100.0f, 100.0f, true_gelu_tanh, false), 0x1p-22);
}

float one(ElementFunction function, float x) {
  float y;
  (reference().*function)(&x, 1, &y);
  return y;
}

TEST(LayerFunctions, LimitsAndZeros) {
  for (const ElementFunction function : {&LayerFunctions::erf, &LayerFunctions::tanh}) {
    EXPECT_EQ(bits_of({one(function, 0.0f), one(function, -0.0f)}), bits_of({0.0f, -0.0f}));
    EXPECT_EQ(bits_of({one(function, kInfinity), one(function, -kInfinity), one(function, kNan)}),
              bits_of({1.0f, -1.0f, kNan}));
  }
  EXPECT_EQ(bits_of({one(&LayerFunctions::exp, 0.0f), one(&LayerFunctions::exp, -kInfinity),
                     one(&LayerFunctions::exp, kInfinity), one(&LayerFunctions::exp, kNan)}),
            bits_of({1.0f, 0.0f, kInfinity, kNan}));
}

// ---- dense

struct DenseCase {
  std::vector<std::byte> bytes;
  Floats scale;
  DenseMatrix matrix;

  DenseCase(DType dtype, std::int64_t rows, std::int64_t cols, unsigned seed)
      : bytes(static_cast<std::size_t>(rows * cols) * bitcore::size_of(dtype)), scale(random_floats(rows, seed + 1)) {
    if (dtype == DType::int8) {
      const Floats values = random_floats(rows * cols, seed, 50.0f);
      for (std::size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = static_cast<std::byte>(static_cast<std::int8_t>(std::fmin(std::fmax(values[i], -127.0f), 127.0f)));
      }
    } else {
      bitcore::narrow(test_floats(rows * cols, seed).data(), rows * cols, dtype, bytes.data());
    }
    matrix = {bytes.data(), dtype, rows, cols, dtype == DType::int8 ? scale.data() : nullptr};
  }
};

constexpr DType kDenseTypes[] = {DType::float32, DType::bfloat16, DType::float16, DType::int8};

// Products of rows [first, last), between elements that are not to be written.
Floats products(const LayerFunctions& f, const DenseMatrix& w, std::int64_t first, std::int64_t last,
                std::int64_t tokens, unsigned seed) {
  const std::int64_t x_stride = w.cols + 3, y_stride = last - first + 5;
  const Floats x = test_floats(tokens * x_stride, seed);
  Floats y = empty(tokens * y_stride);
  f.dense(w, first, last, x.data(), tokens, x_stride, y.data(), y_stride);
  return y;
}

void compare_products(const DenseMatrix& w, std::int64_t first, std::int64_t last, std::int64_t tokens, unsigned seed) {
  const auto expected = bits_of(products(reference(), w, first, last, tokens, seed));
  on_every_path([&](const LayerFunctions& f) {
    EXPECT_TRUE(bits_of(products(f, w, first, last, tokens, seed)) == expected)
        << to_string(w.dtype) << ", rows " << first << " to " << last << ", " << w.cols << " columns, " << tokens
        << " tokens";
  });
}

TEST(LayerFunctions, DenseOfAllTokensAndRows) {
  for (const DType dtype : kDenseTypes) {
    const DenseCase c(dtype, 29, 53, 2);
    for (const std::int64_t tokens : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 65, 67}) {
      for (const std::int64_t last : {2, 3, 7, 9, 14, 29}) compare_products(c.matrix, 2, last, tokens, 4);
    }
  }
}

TEST(LayerFunctions, DenseOfAllColumns) {
  for (const DType dtype : kDenseTypes) {
    for (const std::int64_t cols : counts()) {
      const bool wide = cols > 70;
      const DenseCase c(dtype, wide ? 7 : 13, cols, 2);
      for (const std::int64_t tokens : {1, 3, 6}) compare_products(c.matrix, 0, c.matrix.rows, tokens, 4);
      if (HasFailure()) return;
    }
  }
}

TEST(LayerFunctions, DenseOfExtremeValues) {
  for (const DType dtype : kDenseTypes) {
    for (const std::int64_t cols : {1, 5, 16, 23, 1030}) {
      const DenseCase c(dtype, 13, cols, 3);
      for (const std::int64_t tokens : {1, 2, 4, 9}) compare_products(c.matrix, 0, 13, tokens, 4);
      const DenseCase ordinary(dtype, 13, cols, 2);
      for (const std::int64_t tokens : {1, 2, 4, 9}) compare_products(ordinary.matrix, 0, 13, tokens, 5);
    }
  }
}

// A lane whose sum underflowed to -0 stays -0 where its row ends before the others.
TEST(LayerFunctions, DenseKeepsMinusZeroOfLanesWithoutAnElement) {
  Floats x(20, 1e-30f), w(20 * 7, -1e-30f);
  const DenseMatrix matrix{w.data(), DType::float32, 7, 20, nullptr};
  on_every_path([&](const LayerFunctions& f) {
    for (const std::int64_t tokens : {1, 6}) {
      Floats many, y(static_cast<std::size_t>(7 * tokens), 1.0f);
      for (std::int64_t token = 0; token < tokens; ++token) many.insert(many.end(), x.begin(), x.end());
      f.dense(matrix, 0, 7, many.data(), tokens, 20, y.data(), 7);
      EXPECT_EQ(bits_of(y), bits_of(Floats(y.size(), -0.0f)));
    }
  });
}

TEST(LayerFunctions, DenseRow) {
  for (const DType dtype : kDenseTypes) {
    for (const std::int64_t cols : counts()) {
      const DenseCase c(dtype, 3, cols, 3);
      const auto row_of = [&](const LayerFunctions& f, std::int64_t row) {
        Floats out = empty(cols);
        f.dense_row(c.matrix, row, out.data());
        return bits_of(out);
      };
      for (std::int64_t row = 0; row < 3; ++row) {
        on_every_path([&](const LayerFunctions& f) { EXPECT_EQ(row_of(f, row), row_of(reference(), row)) << cols; });
      }
    }
  }
}

// ---- ternary rows

TEST(TernaryRow, GivesCodesTimesTheirScales) {
  for (const bitcore::Layout layout : bitcore::kLayouts) {
    for (const bitcore::BitQuantConfig& config : bitcore::testing::typical_configs()) {
      for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{1, 17}, {5, 33}, {37, 97}, {19, 1301}}) {
        const auto codes = bitcore::testing::random_codes(rows * cols, 1);
        const auto packed = bitcore::pack_weights({codes.data(), rows, cols}, layout);
        const auto shape = bitcore::packed_shape(rows, cols, layout);
        const auto scale = bitcore::testing::random_scales(rows, cols, config, 2);
        const bool grouped = config.weight_granularity == bitcore::Granularity::per_group;
        const std::int64_t groups = grouped ? (cols + config.group_size - 1) / config.group_size : 1;
        for (std::int64_t row = 0; row < rows; ++row) {
          Floats out = empty(cols), expected = out;
          for (std::int64_t k = 0; k < cols; ++k) {
            const std::int64_t group = grouped ? k / config.group_size : 0;
            const bool shared = config.weight_granularity == bitcore::Granularity::per_tensor;
            expected[static_cast<std::size_t>(k)] =
                static_cast<float>(codes[static_cast<std::size_t>(row * cols + k)]) *
                scale[shared ? 0 : row * groups + group];
          }
          ASSERT_TRUE(ternary_row({packed.data(), rows, shape.row_bytes()}, shape, scale, config, row, out.data()));
          ASSERT_EQ(bits_of(out), bits_of(expected)) << rows << " x " << cols << ", row " << row;
        }
      }
    }
  }
}

TEST(TernaryRow, ReportsInvalidCodes) {
  constexpr std::int64_t kRows = 18, kCols = 700;
  const bitcore::BitQuantConfig config;
  const Floats scale = {0.5f};
  for (const bitcore::Layout layout : bitcore::kLayouts) {
    const auto codes = bitcore::testing::random_codes(kRows * kCols, 1);
    const auto shape = bitcore::packed_shape(kRows, kCols, layout);
    for (const std::int64_t word : {std::int64_t{0}, shape.steps() - 1}) {
      auto packed = bitcore::pack_weights({codes.data(), kRows, kCols}, layout);
      packed[static_cast<std::size_t>(16 * shape.payload_row_bytes + word * 8 + 4)] = 0xff;  // row 17
      Floats out(kCols);
      const bitcore::ConstMatrixView view{packed.data(), kRows, shape.row_bytes()};
      for (std::int64_t row = 0; row < kRows; ++row) {
        EXPECT_EQ(ternary_row(view, shape, scale, config, row, out.data()), row != 17);
      }
    }
  }
}

}  // namespace
}  // namespace bitlayers
