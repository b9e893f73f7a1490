// The explicit backward against the straight-through formulas in float64.
#include <algorithm>
#include <functional>
#include <stdexcept>

#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::Codes;
using testing::expect_error;
using testing::Floats;
using testing::random_floats;

constexpr std::int64_t kOut = 7, kIn = 21, kTokens = 5;

// dq(values) by the public base operations.
Floats fake_weight(const Floats& weight, const BitQuantConfig& config) {
  const ConstMatrixView view(weight.data(), kOut, kIn);
  Codes codes(weight.size());
  Floats out(weight.size());
  const FloatVector scale = compute_weight_scale(view, config);
  quantize_weight(view, scale, config, {codes.data(), kOut, kIn});
  dequantize_weight({codes.data(), kOut, kIn}, scale, config, {out.data(), kOut, kIn});
  return out;
}

Floats fake_x(const Floats& x, const BitQuantConfig& config) {
  if (config.activation_dtype == ActivationDtype::float32) return x;
  const ConstMatrixView view(x.data(), kTokens, kIn);
  Codes codes(x.size());
  Floats out(x.size());
  const Floats scale = compute_x_scale(view, config);
  quantize_x(view, scale, config, {codes.data(), kTokens, kIn});
  dequantize_x({codes.data(), kTokens, kIn}, scale, config, {out.data(), kTokens, kIn});
  return out;
}

// sum over i of a(i) * b(i) in float64
template <class A, class B>
double dot(std::int64_t count, const A& a, const B& b) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(a(i)) * b(i);
  return sum;
}

TEST(Backward, IsStraightThrough) {
  const Floats x = random_floats(kTokens * kIn, 1), weight = random_floats(kOut * kIn, 2);
  const Floats dy = random_floats(kTokens * kOut, 3);
  ThreadPool two_threads(2);
  for (const BitQuantConfig& config : all_configs()) {
    SCOPED_TRACE(to_string(config));
    Floats y(kTokens * kOut), dx(x.size(), 9.0f), dw(weight.size(), 9.0f), db(kOut, 9.0f);
    const auto saved = bitlinear::forward_training({x.data(), kTokens, kIn}, {weight.data(), kOut, kIn}, {}, config,
                                                   {y.data(), kTokens, kOut});
    bitlinear::backward({dy.data(), kTokens, kOut}, saved, config,
                        {{dx.data(), kTokens, kIn}, {dw.data(), kOut, kIn}, db.data()}, two_threads);
    const Floats w = fake_weight(weight, config), fx = fake_x(x, config);
    const auto at = [](const Floats& m, std::int64_t row, std::int64_t cols, std::int64_t col) {
      return m[static_cast<std::size_t>(row * cols + col)];
    };
    for (std::int64_t m = 0; m < kTokens; ++m) {
      for (std::int64_t k = 0; k < kIn; ++k) {
        const double expected = dot(
            kOut, [&](auto n) { return at(dy, m, kOut, n); }, [&](auto n) { return at(w, n, kIn, k); });
        EXPECT_NEAR(at(dx, m, kIn, k), expected, 1e-5);
      }
    }
    for (std::int64_t n = 0; n < kOut; ++n) {
      for (std::int64_t k = 0; k < kIn; ++k) {
        const double expected = dot(
            kTokens, [&](auto m) { return at(dy, m, kOut, n); }, [&](auto m) { return at(fx, m, kIn, k); });
        EXPECT_NEAR(at(dw, n, kIn, k), expected, 1e-5);
      }
      const double sum = dot(
          kTokens, [&](auto m) { return at(dy, m, kOut, n); }, [](auto) { return 1.0; });
      EXPECT_NEAR(db[static_cast<std::size_t>(n)], sum, 1e-5);
    }
  }
}

// Two-byte floats as float32, and back: rounded once.
std::vector<std::uint16_t> narrowed(const Floats& values, DType dtype) {
  std::vector<std::uint16_t> out(values.size());
  const auto size = static_cast<std::int64_t>(values.size());
  convert({values.data(), 1, size}, {out.data(), dtype, 1, size, size});
  return out;
}

TEST(Backward, ReadsAndWritesEveryFloatingDtype) {
  const Floats x = random_floats(kTokens * kIn, 1), weight = random_floats(kOut * kIn, 2);
  for (const BitQuantConfig& config : all_configs()) {
    SCOPED_TRACE(to_string(config));
    Floats y(kTokens * kOut);
    const auto saved = bitlinear::forward_training({x.data(), kTokens, kIn}, {weight.data(), kOut, kIn}, {}, config,
                                                   {y.data(), kTokens, kOut});
    for (const DType dtype : {DType::bfloat16, DType::float16}) {
      const auto dy = narrowed(random_floats(kTokens * kOut, 3), dtype);
      Floats wide_dy(dy.size()), dx(x.size()), dw(weight.size()), db(kOut), same_db(kOut);
      const ConstMatrixView dy_view(dy.data(), dtype, kTokens, kOut, kOut);
      convert(dy_view, {wide_dy.data(), kTokens, kOut});
      bitlinear::backward({wide_dy.data(), kTokens, kOut}, saved, config,
                          {{dx.data(), kTokens, kIn}, {dw.data(), kOut, kIn}, db.data()});
      std::vector<std::uint16_t> narrow_dx(x.size()), narrow_dw(weight.size());
      bitlinear::backward(
          dy_view, saved, config,
          {{narrow_dx.data(), dtype, kTokens, kIn, kIn}, {narrow_dw.data(), dtype, kOut, kIn, kIn}, same_db.data()});
      EXPECT_EQ(narrow_dx, narrowed(dx, dtype));
      EXPECT_EQ(narrow_dw, narrowed(dw, dtype));
      EXPECT_EQ(same_db, db);
    }
  }
}

// Plain sums in float32, and how often they were asked for.
struct PlainMatmul {
  int calls = 0;

  static Floats widened(ConstMatrixView m) {
    Floats values(static_cast<std::size_t>(m.rows * m.cols));
    convert(m, {values.data(), m.rows, m.cols});
    return values;
  }

  void operator()(ConstMatrixView left, bool transpose_left, ConstMatrixView right, MatrixView out) {
    ++calls;
    EXPECT_EQ(left.dtype, right.dtype);
    EXPECT_EQ(left.dtype, out.dtype);
    EXPECT_EQ(transpose_left ? left.cols : left.rows, out.rows);
    const Floats a = widened(left), b = widened(right);
    Floats sums(static_cast<std::size_t>(out.rows * out.cols));
    for (std::int64_t i = 0; i < out.rows; ++i) {
      for (std::int64_t k = 0; k < right.rows; ++k) {
        const float factor = a[static_cast<std::size_t>(transpose_left ? k * left.cols + i : i * left.cols + k)];
        for (std::int64_t j = 0; j < out.cols; ++j) {
          sums[static_cast<std::size_t>(i * out.cols + j)] += factor * b[static_cast<std::size_t>(k * out.cols + j)];
        }
      }
    }
    convert({sums.data(), out.rows, out.cols}, out);
  }
};

// Within a part of the largest magnitude.
void expect_close(const Floats& found, const Floats& expected, float relative) {
  float largest = 0.0f;
  for (const float value : expected) largest = std::max(largest, std::fabs(value));
  for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], relative * largest) << "at " << i;
}

TEST(Backward, HandsLargeProductsToTheCallersMatmul) {
  constexpr std::int64_t kRows = 2, kFeatures = 7000, kWide = 330;
  const Floats x = random_floats(kRows * kWide, 1), weight = random_floats(kFeatures * kWide, 2);
  const Floats dy = random_floats(kRows * kFeatures, 3);
  const auto narrow_dy = narrowed(dy, DType::bfloat16);
  for (const BitQuantConfig& config :
       {BitQuantConfig{Granularity::per_channel}, BitQuantConfig{.activation_dtype = ActivationDtype::float32}}) {
    SCOPED_TRACE(to_string(config));
    Floats y(kRows * kFeatures);
    const auto saved = bitlinear::forward_training({x.data(), kRows, kWide}, {weight.data(), kFeatures, kWide}, {},
                                                   config, {y.data(), kRows, kFeatures});
    const bool float_x = config.activation_dtype == ActivationDtype::float32;
    const bitlinear::BackwardInputs packed = {float_x ? saved.x : ConstMatrixView(saved.qx.data(), kRows, kWide),
                                              saved.x_scale, saved.weights.view(), saved.weights.scale};
    bitlinear::BackwardInputs floating = packed;
    floating.qweight = {weight.data(), kFeatures, kWide};
    for (const bitlinear::BackwardInputs& inputs : {packed, floating}) {
      for (const ConstMatrixView dy_view :
           {ConstMatrixView(dy.data(), kRows, kFeatures),
            ConstMatrixView(narrow_dy.data(), DType::bfloat16, kRows, kFeatures, kFeatures)}) {
        PlainMatmul matmul;
        Floats dx(x.size()), dw(weight.size()), loops_dx(x.size()), loops_dw(weight.size());
        bitlinear::backward(dy_view, inputs, config,
                            {{dx.data(), kRows, kWide}, {dw.data(), kFeatures, kWide}, nullptr}, default_executor(),
                            std::ref(matmul));
        bitlinear::backward(dy_view, inputs, config,
                            {{loops_dx.data(), kRows, kWide}, {loops_dw.data(), kFeatures, kWide}, nullptr});
        EXPECT_GE(matmul.calls, 3);  // dx in blocks of 320 columns
        const float relative = dy_view.dtype == DType::bfloat16 ? 1e-2f : 1e-5f;
        expect_close(dx, loops_dx, relative);
        expect_close(dw, loops_dw, relative);
      }
    }
  }
}

TEST(Backward, CarriesTheErrorOfTheMatmulAndNeverCallsItForLittleWork) {
  const auto broken = [](ConstMatrixView, bool, ConstMatrixView, MatrixView) { throw std::runtime_error("no memory"); };
  for (const std::int64_t rows : {256, 257}) {
    const Floats x(static_cast<std::size_t>(rows)), weight(1, 1.0f), dy(static_cast<std::size_t>(rows), 1.0f);
    Floats y(x.size()), dx(x.size());
    const auto saved =
        bitlinear::forward_training({x.data(), rows, 1}, {weight.data(), 1, 1}, {}, {}, {y.data(), rows, 1});
    const auto call = [&] {
      bitlinear::backward({dy.data(), rows, 1}, saved, {}, {{dx.data(), rows, 1}, {}, nullptr}, default_executor(),
                          broken);
    };
    if (rows == 256) {
      call();
    } else {
      expect_error<std::runtime_error>(call, {"no memory"});
    }
  }
}

TEST(Backward, SkipsWhatIsNotAskedForAndChecksShapes) {
  const Floats x(kTokens * kIn, 1.0f), weight(kOut * kIn, 1.0f), dy(kTokens * kOut, 1.0f);
  Floats y(kTokens * kOut), db(kOut);
  const auto saved = bitlinear::forward_training({x.data(), kTokens, kIn}, {weight.data(), kOut, kIn}, {}, {},
                                                 {y.data(), kTokens, kOut});
  bitlinear::backward({dy.data(), kTokens, kOut}, saved, {}, {{}, {}, db.data()});
  EXPECT_EQ(db, Floats(kOut, static_cast<float>(kTokens)));
  expect_error<QuantizationError>(
      [&] {
        bitlinear::backward({dy.data(), kOut, kTokens}, saved, {}, {});
      },
      {"dy has shape (7, 5)", "(5, 7)"});
  Floats dx(x.size());
  expect_error<QuantizationError>(
      [&] {
        bitlinear::backward({dy.data(), kTokens, kOut}, saved, {}, {{dx.data(), kIn, kTokens}, {}, nullptr});
      },
      {"dx has shape (21, 5)", "(5, 21)"});
}

}  // namespace
}  // namespace bitcore
