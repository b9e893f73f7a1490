// Scales, codes and packing: each operator is one call into the engine.
#include <algorithm>

#include "bitcore/exceptions.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/packing.h"
#include "bitcore/torch_executor.h"
#include "ops.h"

namespace bitcore::torch_ops {

Tensor compute_weight_scale(const Tensor& weight, bool per_channel, std::int64_t group_size) {
  const BitQuantConfig config = weight_config(per_channel, group_size);
  const Matrix w = floating_matrix(weight, "weight");
  Tensor scale = empty_weight_scale(w.view.rows, w.view.cols, config);
  bitcore::compute_weight_scale(w.view, config, output_vector(scale), torch_executor());
  return scale;
}

Tensor quantize_weight(const Tensor& weight, const Tensor& scale, bool per_channel, std::int64_t group_size) {
  const BitQuantConfig config = weight_config(per_channel, group_size);
  const Matrix w = floating_matrix(weight, "weight");
  const Scale s = weight_scale(scale, "scale", w.view.rows, w.view.cols, config);
  Tensor qweight = empty({w.view.rows, w.view.cols}, ScalarType::Char);
  bitcore::quantize_weight(w.view, s.values, config, output_rows(qweight), torch_executor());
  return qweight;
}

Tensor dequantize_weight(const Tensor& qweight, const Tensor& scale, bool per_channel, std::int64_t group_size) {
  const BitQuantConfig config = weight_config(per_channel, group_size);
  const Matrix q = code_matrix(qweight, "qweight");
  const Scale s = weight_scale(scale, "scale", q.view.rows, q.view.cols, config);
  Tensor weight = empty({q.view.rows, q.view.cols}, ScalarType::Float);
  bitcore::dequantize_weight(q.view, s.values, config, output_rows(weight));
  return weight;
}

Tensor compute_x_scale(const Tensor& x, bool int8_activations, bool per_channel, std::int64_t group_size) {
  const BitQuantConfig config = x_config(per_channel, group_size);
  const Matrix rows = floating_rows(x, "x");
  Tensor scale = empty_x_scale(x, config);
  const std::span<float> values = output_floats(scale);
  if (int8_activations) {
    bitcore::compute_x_scale(rows.view, config, values, torch_executor());
  } else {
    std::fill(values.begin(), values.end(), 1.0f);
  }
  return scale;
}

Tensor quantize_x(const Tensor& x, const Tensor& scale, bool per_channel, std::int64_t group_size) {
  const BitQuantConfig config = x_config(per_channel, group_size);
  const Matrix rows = floating_rows(x, "x");
  const Scale s = x_scale(scale, x, config);
  Tensor qx = empty(replace_last(x, rows.view.cols), ScalarType::Char);
  bitcore::quantize_x(rows.view, s.values.floats(), config, output_rows(qx), torch_executor());
  return qx;
}

Tensor dequantize_x(const Tensor& qx, const Tensor& scale, bool per_channel, std::int64_t group_size) {
  const BitQuantConfig config = x_config(per_channel, group_size);
  const Matrix rows = code_rows(qx, "qx");
  const Scale s = x_scale(scale, qx, config);
  Tensor x = empty(replace_last(qx, rows.view.cols), ScalarType::Float);
  bitcore::dequantize_x(rows.view, s.values.floats(), config, output_rows(x));
  return x;
}

Tensor pack_weights(const Tensor& qweight, StringArgument layout) {
  const Layout chosen = parse_layout(take_string(layout));
  const Matrix q = code_matrix(qweight, "qweight");
  const PackedShape shape = packed_shape(q.view.rows, q.view.cols, chosen);
  Tensor packed = empty({shape.out_features, shape.row_bytes()}, ScalarType::Byte);
  bitcore::pack_weights(q.view, output_rows(packed), chosen);
  return packed;
}

Tensor unpack_weights(const Tensor& qweight, std::int64_t in_features, bool check) {
  const Matrix packed = packed_matrix(qweight, /*allow_codes=*/false);
  check_trailer(packed.view, in_features);
  Tensor codes = empty({packed.view.rows, in_features}, ScalarType::Char);
  bitcore::unpack_weights(packed.view, output_rows(codes), check ? Verify::every_byte : Verify::trailer,
                          torch_executor());
  return codes;
}

void check_qweight(const Tensor& qweight, std::int64_t in_features) {
  bitcore::check_qweight(packed_matrix(qweight, /*allow_codes=*/false).view, in_features);
}

}  // namespace bitcore::torch_ops
