// Views without memory and of impossible sizes, in every public function: an error that names the argument.
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::Codes;
using testing::expect_error;
using testing::Floats;
using testing::random_codes;
using testing::random_floats;

constexpr std::int64_t kRows = 8, kOut = 32, kIn = 64;

// Valid arguments of every function.
struct Arguments {
  BitQuantConfig config{.activation_granularity = Granularity::per_channel};
  Floats x = random_floats(kRows * kIn, 1), weight = random_floats(kOut * kIn, 2), y = Floats(kRows * kOut);
  Floats bias = random_floats(kOut, 3), x_scale = Floats(kRows, 1.0f), weight_scale = Floats(1, 1.0f);
  Floats dx = Floats(kRows * kIn), dweight = Floats(kOut * kIn);
  Codes qx = random_codes(kRows * kIn, 4), codes = random_codes(kOut * kIn, 5);
  bitlinear::PreparedWeights prepared = bitlinear::prepare_weights(weight_view(), config);

  ConstMatrixView x_view() const { return {x.data(), kRows, kIn}; }
  ConstMatrixView weight_view() const { return {weight.data(), kOut, kIn}; }
  MatrixView y_view() { return {y.data(), kRows, kOut}; }
  MatrixView qx_view() { return {qx.data(), kRows, kIn}; }
  MatrixView codes_view() { return {codes.data(), kOut, kIn}; }
  MatrixView packed_view() { return {prepared.qweight.data(), kOut, prepared.shape.row_bytes()}; }
  bitlinear::BackwardInputs inputs() { return {qx_view(), x_scale, packed_view(), prepared.scale}; }
};

// The ways in which a matrix of at least two rows is none, with what the error says of it.
template <class View>
std::vector<std::pair<View, std::vector<std::string>>> damaged(View view) {
  const std::string rows = std::to_string(view.rows), cols = std::to_string(view.cols);
  std::vector<std::pair<View, std::vector<std::string>>> views;
  const auto add = [&](auto&& change, const std::vector<std::string>& parts) {
    views.emplace_back(view, parts);
    change(views.back().first);
  };
  add([](View& v) { v.data = nullptr; }, {"null", rows, cols});
  add([](View& v) { v.row_stride = v.cols - 1; }, {});
  add([](View& v) { v.row_stride = -v.cols; }, {});
  add([](View& v) { v.row_stride = std::int64_t{1} << 60; }, {});
  add([](View& v) { v.rows = -v.rows; }, {"-" + rows});
  add([](View& v) { v.cols = -v.cols; }, {"-" + cols});
  return views;
}

// `call` with every damaged form of a view throws an error that names `argument`.
template <class View, class Call>
void expect_checked(const char* argument, View view, const Call& call) {
  ASSERT_NO_THROW(call(view)) << argument;
  for (const auto& damage : damaged(view)) {
    const View& bad = damage.first;
    std::vector<std::string> expected = damage.second;
    expected.emplace_back(argument);
    expect_error<QuantizationError>([&] { call(bad); }, expected);
  }
}

TEST(Views, Forward) {
  Arguments a;
  using bitlinear::forward;
  expect_checked("x", a.x_view(), [&](auto x) { forward(x, a.prepared, {}, a.config, a.y_view()); });
  expect_checked("y", a.y_view(), [&](auto y) { forward(a.x_view(), a.prepared, {}, a.config, y); });
  expect_checked("qweight", a.packed_view(),
                 [&](auto qweight) { forward(a.x_view(), a.prepared.scale, qweight, {}, a.config, a.y_view()); });
  expect_checked("qweight", a.codes_view(),
                 [&](auto qweight) { forward(a.x_view(), a.prepared.scale, qweight, {}, a.config, a.y_view()); });
  expect_checked("qx", a.qx_view(), [&](auto qx) {
    bitlinear::forward_quantized(qx, a.x_scale, a.prepared.scale, a.packed_view(), {}, a.config, a.y_view());
  });
}

// A count of rows that is wrong everywhere fits itself.
TEST(Views, NegativeRowsOfXAndY) {
  Arguments a;
  expect_error<QuantizationError>(
      [&] {
        bitlinear::forward({a.x.data(), -kRows, kIn}, a.prepared, {}, a.config, {a.y.data(), -kRows, kOut});
      },
      {"x has shape (-8, 64)"});
}

TEST(Views, OneRowNeedsNoStride) {
  Arguments a;
  const ConstMatrixView one(a.x.data(), DType::float32, 1, kIn, 0);
  bitlinear::forward(one, a.prepared, {}, a.config, {a.y.data(), DType::float32, 1, kOut, 0});
  Floats expected(kOut);
  bitlinear::forward({a.x.data(), 1, kIn}, a.prepared, {}, a.config, {expected.data(), 1, kOut});
  EXPECT_EQ(Floats(a.y.begin(), a.y.begin() + kOut), expected);
}

TEST(Views, NoRowsNeedNoMemory) {
  Arguments a;
  const Floats none;
  Floats no_y;
  bitlinear::forward({none.data(), 0, kIn}, a.prepared, {}, a.config, {no_y.data(), 0, kOut});
}

TEST(Views, Training) {
  Arguments a;
  using namespace bitlinear;
  expect_checked("x", a.x_view(), [&](auto x) { forward_training(x, a.weight_view(), {}, a.config, a.y_view()); });
  expect_checked("y", a.y_view(), [&](auto y) { forward_training(a.x_view(), a.weight_view(), {}, a.config, y); });
  for (const auto& [weight, parts] : damaged(a.weight_view())) {
    EXPECT_THROW(forward_training(a.x_view(), weight, {}, a.config, a.y_view()), QuantizationError);
    EXPECT_THROW(prepare_weights(weight, a.config), QuantizationError);
  }
  const ConstMatrixView no_weight(static_cast<const float*>(nullptr), kOut, kIn);
  expect_error<QuantizationError>([&] { prepare_weights(no_weight, a.config); }, {"weight is null", "(32, 64)"});
  expect_checked("packed", a.packed_view(), [&](auto packed) {
    prepare_weights_into(a.weight_view(), a.config, Layout::automatic, NonFinite::reject, a.weight_scale, packed,
                         serial_executor());
  });
}

TEST(Views, Backward) {
  Arguments a;
  using bitlinear::backward;
  const MatrixView dx(a.dx.data(), kRows, kIn), dweight(a.dweight.data(), kOut, kIn);
  expect_checked("dy", a.y_view(), [&](auto dy) { backward(dy, a.inputs(), a.config, {dx, dweight}); });
  expect_checked("dx", dx, [&](auto m) { backward(a.y_view(), a.inputs(), a.config, {m, dweight}); });
  expect_checked("dweight", dweight, [&](auto m) { backward(a.y_view(), a.inputs(), a.config, {dx, m}); });
  expect_checked("qx", a.qx_view(), [&](auto qx) {
    bitlinear::BackwardInputs inputs = a.inputs();
    inputs.qx = qx;
    backward(a.y_view(), inputs, a.config, {dx, dweight});
  });
  expect_checked("qweight", a.packed_view(), [&](auto qweight) {
    bitlinear::BackwardInputs inputs = a.inputs();
    inputs.qweight = qweight;
    backward(a.y_view(), inputs, a.config, {dx, dweight});
  });
  Floats dbias(kOut);
  expect_checked("dy", a.y_view(), [&](auto dy) { backward(dy, a.inputs(), a.config, {{}, {}, dbias.data()}); });
}

TEST(Views, WhatTrainingKeptMustBeWhole) {
  Arguments a;
  const MatrixView dx(a.dx.data(), kRows, kIn);
  expect_error<QuantizationError>(
      [&] {
        bitlinear::backward(a.y_view(), bitlinear::SavedTensors(), a.config, {dx, {}});
      },
      {"out_features", "0"});
  bitlinear::PreparedWeights cut = a.prepared;
  cut.qweight.resize(cut.qweight.size() - 1);
  expect_error<QuantizationError>(
      [&] { bitlinear::forward(a.x_view(), cut, {}, a.config, a.y_view()); },
      {"weights.qweight", std::to_string(cut.qweight.size()), std::to_string(cut.qweight.size() + 1)});
}

TEST(Views, Quantization) {
  Arguments a;
  const BitQuantConfig& c = a.config;
  Floats out(kOut * kIn);
  const MatrixView weight_out(out.data(), kOut, kIn), x_out(out.data(), kRows, kIn);
  expect_checked("weight", a.weight_view(), [&](auto m) { compute_weight_scale(m, c); });
  expect_checked("weight", a.weight_view(), [&](auto m) { compute_weight_scale(m, c, a.weight_scale); });
  expect_checked("x", a.x_view(), [&](auto m) { compute_x_scale(m, c); });
  expect_checked("x", a.x_view(), [&](auto m) { compute_x_scale(m, c, a.x_scale); });
  for (const auto& [m, parts] : damaged(a.weight_view())) {
    EXPECT_THROW(quantize_weight(m, a.weight_scale, c, a.codes_view()), QuantizationError);
    EXPECT_THROW(convert(m, weight_out), QuantizationError);
  }
  for (const auto& [m, parts] : damaged(a.x_view())) {
    EXPECT_THROW(quantize_x(m, a.x_scale, c, a.qx_view()), QuantizationError);
  }
  expect_checked("output", a.codes_view(), [&](auto m) { quantize_weight(a.weight_view(), a.weight_scale, c, m); });
  expect_checked("output", a.qx_view(), [&](auto m) { quantize_x(a.x_view(), a.x_scale, c, m); });
  expect_checked("output", weight_out, [&](auto m) { dequantize_weight(a.codes_view(), a.weight_scale, c, m); });
  expect_checked("output", x_out, [&](auto m) { dequantize_x(a.qx_view(), a.x_scale, c, m); });
  expect_checked("to", weight_out, [&](auto m) { convert(a.weight_view(), m); });
  for (const auto& [m, parts] : damaged(a.codes_view())) {
    EXPECT_THROW(dequantize_weight(m, a.weight_scale, c, weight_out), QuantizationError);
  }
  for (const auto& [m, parts] : damaged(a.qx_view())) {
    EXPECT_THROW(dequantize_x(m, a.x_scale, c, x_out), QuantizationError);
  }
  expect_error<QuantizationError>([&] { x_scale_size(-8, 1, c); }, {"rows", "-8"});
  expect_error<QuantizationError>([&] { weight_scale_size(-8, 1, c); }, {"out_features", "-8"});
}

TEST(Views, Packing) {
  Arguments a;
  for (const auto& [m, parts] : damaged(a.codes_view())) {
    EXPECT_THROW(pack_weights(m), QuantizationError);
    EXPECT_THROW(unpack_weights(a.packed_view(), m), QuantizationError);
  }
  expect_checked("packed", a.packed_view(), [&](auto m) { pack_weights(a.codes_view(), m); });
  expect_checked("qweight", a.packed_view(), [&](auto m) { unpack_weights(m, a.codes_view()); });
  expect_checked("qweight", a.packed_view(), [&](auto m) { check_qweight(m, kIn); });
  expect_checked("qweight", a.packed_view(), [&](auto m) { check_trailer(m, kIn); });
  expect_checked("qweight", a.packed_view(), [&](auto m) { repack(m, kIn, Layout::two_bit); });
  const std::uint8_t bytes[8] = {};
  expect_error<QuantizationError>([&] { payload_checksum(nullptr, 8); }, {"payload is null", "8"});
  expect_error<QuantizationError>([&] { payload_checksum(bytes, -4); }, {"-4"});
  expect_error<QuantizationError>([&] { payload_checksum(bytes, 7); }, {"7"});
}

TEST(Views, VectorsWithoutMemory) {
  Arguments a;
  const auto forward = [&](ConstVectorView scale, ConstVectorView bias, const bitlinear::Options& options) {
    bitlinear::forward(a.x_view(), scale, a.packed_view(), bias, a.config, a.y_view(), options);
  };
  const float* none = nullptr;
  forward(a.prepared.scale, {none, 0}, {});  // no bias
  expect_error<QuantizationError>([&] { forward(a.prepared.scale, {none, kOut}, {}); }, {"bias is null", "32"});
  expect_error<QuantizationError>([&] { forward(a.prepared.scale, {a.bias.data(), -5}, {}); }, {"bias", "-5"});
  expect_error<QuantizationError>([&] { forward({none, 1}, {}, {}); }, {"qweight_scale is null"});
  std::byte* no_bytes = nullptr;
  expect_error<QuantizationError>(
      [&] {
        forward(a.prepared.scale, {}, {.workspace = {no_bytes, std::size_t{1} << 20}});
      },
      {"workspace is null"});
  expect_error<QuantizationError>(
      [&] {
        quantize_x(a.x_view(), {none, kRows}, a.config, a.qx_view());
      },
      {"scale is null", "8"});
  expect_error<QuantizationError>(
      [&] {
        bitlinear::forward_quantized(a.qx_view(), {none, kRows}, a.prepared.scale, a.packed_view(), {}, a.config,
                                     a.y_view());
      },
      {"x_scale is null", "8"});
}

}  // namespace
}  // namespace bitcore
