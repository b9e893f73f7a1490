// Packed weights through the C API: each function is one call into the engine.
#include "bitcore/ops/packing.h"

#include <string>

#include "bitcore/exceptions.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitlab.h"
#include "guarded.h"

namespace {

using bitcore::BitQuantConfig;
using bitcore::ConstMatrixView;
using bitcore::DType;
using bitcore::Granularity;
using bitcore::Layout;
using bitcore::MatrixView;
using bitcore::QuantizationError;
using bitcore::c_api::guarded;

DType dtype_of(bitlab_dtype dtype) {
  switch (dtype) {
    case BITLAB_FLOAT32:
      return DType::float32;
    case BITLAB_BFLOAT16:
      return DType::bfloat16;
    case BITLAB_FLOAT16:
      return DType::float16;
    case BITLAB_INT8:
      return DType::int8;
    case BITLAB_UINT8:
      return DType::uint8;
  }
  throw QuantizationError("dtype is " + std::to_string(dtype) + ", expected 0 to 4");
}

Layout layout_of(bitlab_layout layout) {
  if (layout != BITLAB_2BIT && layout != BITLAB_BASE3) {
    throw QuantizationError("layout is " + std::to_string(layout) + ", expected 1 (2bit) or 2 (1.6bit)");
  }
  return static_cast<Layout>(layout);
}

BitQuantConfig config_of(bitlab_granularity granularity, std::int64_t group_size) {
  if (granularity < BITLAB_PER_TENSOR || granularity > BITLAB_PER_GROUP) {
    throw QuantizationError("granularity is " + std::to_string(granularity) + ", expected 0 to 2");
  }
  return {.weight_granularity = static_cast<Granularity>(granularity), .group_size = group_size};
}

ConstMatrixView view_of(const bitlab_matrix& matrix) {
  return {matrix.data, dtype_of(matrix.dtype), matrix.rows, matrix.cols, matrix.row_stride};
}

void require_size(const char* name, std::size_t bytes, std::int64_t expected) {
  if (bytes != static_cast<std::size_t>(expected)) {
    throw QuantizationError(std::string(name) + " has " + std::to_string(bytes) + " bytes, expected " +
                            std::to_string(expected));
  }
}

MatrixView packed_view(const bitcore::PackedShape& shape, std::uint8_t* packed, std::size_t bytes) {
  require_size("packed", bytes, shape.bytes());
  return {packed, shape.out_features, shape.row_bytes()};
}

}  // namespace

bitlab_status bitlab_packed_row_bytes(int64_t out_features, int64_t in_features, bitlab_layout layout,
                                      int64_t* row_bytes) {
  return guarded([&] { *row_bytes = bitcore::packed_shape(out_features, in_features, layout_of(layout)).row_bytes(); });
}

bitlab_status bitlab_pack_weights(bitlab_matrix codes, bitlab_layout layout, uint8_t* packed, size_t packed_bytes) {
  return guarded([&] {
    const auto shape = bitcore::packed_shape(codes.rows, codes.cols, layout_of(layout));
    bitcore::pack_weights(view_of(codes), packed_view(shape, packed, packed_bytes), shape.layout);
  });
}

bitlab_status bitlab_unpack_weights(bitlab_matrix packed, int64_t in_features, int8_t* codes, size_t codes_bytes) {
  return guarded([&] {
    const ConstMatrixView view = view_of(packed);
    bitcore::check_trailer(view, in_features);
    require_size("codes", codes_bytes, view.rows * in_features);
    bitcore::unpack_weights(view, MatrixView(codes, view.rows, in_features), bitcore::Verify::every_byte,
                            bitcore::default_executor());
  });
}

bitlab_status bitlab_prepare_weights(bitlab_matrix weight, bitlab_granularity granularity, int64_t group_size,
                                     bitlab_layout layout, void* scale, size_t scale_bytes, uint8_t* packed,
                                     size_t packed_bytes) {
  return guarded([&] {
    const BitQuantConfig config = config_of(granularity, group_size);
    bitcore::check_config(config);
    const auto shape = bitcore::packed_shape(weight.rows, weight.cols, layout_of(layout));
    const std::int64_t scales = bitcore::weight_scale_size(weight.rows, weight.cols, config);
    const DType dtype = bitcore::weight_scale_dtype(config);
    require_size("scale", scale_bytes, scales * static_cast<std::int64_t>(bitcore::size_of(dtype)));
    bitcore::bitlinear::prepare_weights_into(view_of(weight), config, shape.layout,
                                             bitcore::bitlinear::NonFinite::reject,
                                             bitcore::VectorView(scale, dtype, scales),
                                             packed_view(shape, packed, packed_bytes), bitcore::default_executor());
  });
}
