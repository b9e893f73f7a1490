// The contract in plain loops: slow, obvious, and what every other kernel is tested against.
#include <algorithm>
#include <vector>

#include "bitcore/base/checks.h"
#include "bitcore/base/scales.h"
#include "bitcore/kernels/builtin.h"
#include "bitcore/ops/base.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"

namespace bitcore {
namespace {

class ReferenceKernel final : public BitKernelBase {
 public:
  std::string_view name() const override { return "ReferenceKernel"; }
  bool is_compatible_with(const BitQuantConfig&) const override { return true; }

  void operator()(const LinearArgs& args) const override {
    if (args.x.rows == 0) return;
    const std::int64_t tokens = args.x.rows;
    const std::int64_t in_features = args.x.cols;
    const std::int64_t out_features = args.y.cols;
    const std::vector<std::int8_t> weights = unpack(args, out_features, in_features);
    const Scales scales = weight_scales(args.qweight_scale, in_features, args.config);
    if (args.check_scales) check_usable_scales(args.qweight_scale);
    std::vector<float> bias(static_cast<std::size_t>(out_features));
    if (args.bias) widen(args.bias.data, args.bias.dtype, out_features, bias.data());

    std::vector<float> y(static_cast<std::size_t>(tokens * out_features));
    if (args.config.activation_dtype == ActivationDtype::int8) {
      int8_rows(args, weights, scales, y);
    } else {
      float32_rows(args, weights, scales, y);
    }
    for (std::int64_t m = 0; m < tokens; ++m) {
      float* row = &y[static_cast<std::size_t>(m * out_features)];
      for (std::int64_t n = 0; args.bias && n < out_features; ++n) row[n] = row[n] + bias[static_cast<std::size_t>(n)];
      narrow(row, out_features, args.y.dtype, args.y.row(m));
    }
    count_tiles(static_cast<std::uint64_t>(tokens));
  }

 private:
  // One group: the sum, scaled. Several: their sums, scaled, added up from 0.
  template <class ScaledSum>
  static float sum_of_groups(const Scales& scales, std::int64_t in_features, const ScaledSum& scaled_sum) {
    const bool one = scales.values.dtype != DType::float16;  // 0 + -0 is 0
    float sum = one ? -0.0f : 0.0f;
    for (std::int64_t group = 0; group < scales.groups; ++group) {
      const std::int64_t first = group * scales.group_size;
      sum = sum + scaled_sum(group, first, std::min(scales.group_size, in_features - first));
    }
    return sum;
  }

  static std::vector<std::int8_t> unpack(const LinearArgs& args, std::int64_t out_features, std::int64_t in_features) {
    const PackedShape& shape = args.shape;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.padded_in_features()));
    std::vector<std::int8_t> weights(static_cast<std::size_t>(out_features * in_features));
    for (std::int64_t n = 0; n < out_features; ++n) {
      const auto* payload = static_cast<const std::uint8_t*>(args.qweight.data);
      if (unpack_code_row(payload, shape, n, codes.data()) != 0) {
        fail_invalid_code();
      }
      for (std::int64_t k = 0; k < in_features; ++k) {
        weights[static_cast<std::size_t>(n * in_features + k)] =
            static_cast<std::int8_t>(codes[static_cast<std::size_t>(k)] - 1);
      }
    }
    return weights;
  }

  static void int8_rows(const LinearArgs& args, const std::vector<std::int8_t>& weights, const Scales& w_scales,
                        std::vector<float>& y) {
    const std::int64_t in_features = args.x.cols;
    std::vector<std::int8_t> qx(static_cast<std::size_t>(args.x.rows * in_features));
    std::vector<float> scale(args.x_scale.begin(), args.x_scale.end());
    ConstMatrixView codes = args.x;
    if (args.x_scale.empty()) {
      scale = compute_x_scale(args.x, args.config);
      const MatrixView out(qx.data(), args.x.rows, in_features);
      quantize_x(args.x, scale, args.config, out);
      codes = out;
    }
    const Scales s_x = x_scales(scale, in_features, args.config);
    const bool x_groups = args.config.activation_granularity == Granularity::per_group;
    for (std::int64_t m = 0; m < args.x.rows; ++m) {
      const auto* row = reinterpret_cast<const std::int8_t*>(codes.row(m));
      for (std::int64_t n = 0; n < args.y.cols; ++n) {
        const std::int8_t* w = &weights[static_cast<std::size_t>(n * in_features)];
        y[static_cast<std::size_t>(m * args.y.cols + n)] =
            sum_of_groups(w_scales, in_features, [&](std::int64_t group, std::int64_t first, std::int64_t count) {
              std::int32_t sum = 0;
              for (std::int64_t k = first; k < first + count; ++k) sum += row[k] * w[k];
              return static_cast<float>(sum) * (s_x.at(m, x_groups ? group : 0) * w_scales.at(n, group));
            });
      }
    }
  }

  // Chains of 16 k in order from 0, the chains added in order.
  static float sum_in_chains(const float* x, const std::int8_t* weights, std::int64_t in_features) {
    constexpr std::int64_t kChain = 16;
    float sum = 0.0f;
    for (std::int64_t begin = 0; begin < in_features; begin += kChain) {
      float chain = 0.0f;
      for (std::int64_t k = begin; k < std::min(begin + kChain, in_features); ++k) chain += x[k] * weights[k];
      sum += chain;
    }
    return sum;
  }

  static void float32_rows(const LinearArgs& args, const std::vector<std::int8_t>& weights, const Scales& w_scales,
                           std::vector<float>& y) {
    const std::int64_t in_features = args.x.cols;
    std::vector<float> row(static_cast<std::size_t>(in_features));
    for (std::int64_t m = 0; m < args.x.rows; ++m) {
      widen(args.x.row(m), args.x.dtype, in_features, row.data());
      const float x_scale = absmax_bits(row.data(), in_features) < kInfinityBits ? 1.0f : quiet_nan();
      for (std::int64_t n = 0; n < args.y.cols; ++n) {
        const std::int8_t* w = &weights[static_cast<std::size_t>(n * in_features)];
        y[static_cast<std::size_t>(m * args.y.cols + n)] =
            sum_of_groups(w_scales, in_features, [&](std::int64_t group, std::int64_t first, std::int64_t count) {
              return sum_in_chains(row.data() + first, w + first, count) * (x_scale * w_scales.at(n, group));
            });
      }
    }
  }
};

}  // namespace

std::shared_ptr<const BitKernelBase> make_reference_kernel() { return std::make_shared<ReferenceKernel>(); }

}  // namespace bitcore
