// The explicit backward against the straight-through formulas in float64.
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::all_configs;
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
  const Floats scale = compute_weight_scale(view, config);
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
