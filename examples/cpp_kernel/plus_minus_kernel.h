// A kernel that multiplies nothing: it adds the activations where the weight is 1 and subtracts them where it is -1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "bitcore/kernels/base.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/packing.h"

class PlusMinusKernel final : public bitcore::BitKernelBase {
 public:
  std::string_view name() const override { return "PlusMinusKernel"; }

  bool is_compatible_with(const bitcore::BitQuantConfig& config) const override {
    return config.activation_dtype == bitcore::ActivationDtype::int8 &&
           config.weight_granularity != bitcore::Granularity::per_group;
  }

  void operator()(const bitcore::LinearArgs& args) const override {
    const std::int64_t tokens = args.x.rows, in_features = args.x.cols, out_features = args.y.cols;
    if (tokens == 0) return;
    // Reads both layouts, and throws where a code is invalid.
    std::vector<std::int8_t> weights(static_cast<std::size_t>(out_features * in_features));
    bitcore::unpack_weights(args.qweight, {weights.data(), out_features, in_features});

    // x is floating, or, in training, already quantized.
    std::vector<float> x_scale(args.x_scale.begin(), args.x_scale.end());
    std::vector<std::int8_t> codes(static_cast<std::size_t>(tokens * in_features));
    bitcore::ConstMatrixView qx = args.x;
    if (x_scale.empty()) {
      x_scale = bitcore::compute_x_scale(args.x, args.config);
      const bitcore::MatrixView quantized(codes.data(), tokens, in_features);
      bitcore::quantize_x(args.x, x_scale, args.config, quantized);
      qx = quantized;
    }
    std::vector<float> bias(static_cast<std::size_t>(out_features));
    if (args.bias) {
      bitcore::convert({args.bias.data, args.bias.dtype, 1, out_features, out_features},
                       {bias.data(), 1, out_features});
    }

    const std::span<const float> w_scale = args.qweight_scale.floats();
    std::vector<float> y(static_cast<std::size_t>(tokens * out_features));
    const auto one_token = [&](int m) {
      const auto* row = reinterpret_cast<const std::int8_t*>(qx.row(m));
      const float s_x = x_scale[x_scale.size() == 1 ? 0 : static_cast<std::size_t>(m)];
      for (std::int64_t n = 0; n < out_features; ++n) {
        const std::int32_t sum = plus_minus(row, &weights[static_cast<std::size_t>(n * in_features)], in_features);
        const float s_w = w_scale[w_scale.size() == 1 ? 0 : static_cast<std::size_t>(n)];
        float& out = y[static_cast<std::size_t>(m * out_features + n)];
        out = static_cast<float>(sum) * (s_x * s_w);
        if (args.bias) out = out + bias[static_cast<std::size_t>(n)];
      }
    };
    args.executor->run(static_cast<int>(tokens), one_token);
    bitcore::convert({y.data(), tokens, out_features}, args.y);  // rounded once, to the dtype of y
    count_tiles(static_cast<std::uint64_t>(tokens));
  }

 private:
  // At most 2^24 terms of at most 128: an int32 holds the sum.
  static std::int32_t plus_minus(const std::int8_t* x, const std::int8_t* weights, std::int64_t count) {
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < count; ++k) {
      if (weights[k] > 0) sum += x[k];
      if (weights[k] < 0) sum -= x[k];
    }
    return sum;
  }
};
