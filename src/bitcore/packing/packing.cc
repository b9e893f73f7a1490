// The packed ternary weight: docs/packed-format.md describes every byte that is written and read here.
#include "bitcore/ops/packing.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

#include "bitcore/base/checks.h"
#include "bitcore/base/math.h"
#include "bitcore/base/parallel.h"
#include "bitcore/packing/code_rows.h"
#include "bitcore/packing/packing_internal.h"

namespace bitcore {
namespace {

constexpr char kMagic[8] = {'B', 'I', 'T', 'L', 'A', 'B', 'Q', 'W'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kChecksumFactor = 0x9E3779B97F4A7C15u;

// Where the trailer's fields begin, in bytes; zeros follow the last.
constexpr std::int64_t kVersionAt = 8;
constexpr std::int64_t kLayoutAt = 12;
constexpr std::int64_t kOutFeaturesAt = 16;
constexpr std::int64_t kInFeaturesAt = 24;
constexpr std::int64_t kChecksumAt = 32;
constexpr std::int64_t kZerosAt = 40;

constexpr std::int64_t kWordBytes = 4;  // of a word of the payload: one row's codes of one step

// The one rule of a packed weight's size.
std::int64_t payload_row_bytes(std::int64_t in_features, Layout layout) {
  return kWordBytes * ceil_div(in_features, step_codes(layout));
}
std::int64_t trailer_row_bytes(std::int64_t out_features) { return ceil_div(kTrailerBytes, out_features); }

// Little-endian by shifts, so that the bytes are the same on every machine.
void store_le(std::uint8_t* out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out[i] = static_cast<std::uint8_t>(value >> (8 * i));
}

std::uint64_t load_le(const std::uint8_t* in, int bytes) {
  std::uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= std::uint64_t{in[i]} << (8 * i);
  return value;
}

const std::uint8_t* trailer_of(ConstMatrixView packed) {
  return static_cast<const std::uint8_t*>(packed.data) + packed.rows * (packed.cols - trailer_row_bytes(packed.rows));
}

void check_trailer_zeros(ConstMatrixView packed, const PackedShape& shape) {
  const std::uint8_t* trailer = static_cast<const std::uint8_t*>(packed.data) + shape.payload_bytes();
  const std::int64_t bytes = shape.out_features * shape.trailer_row_bytes;
  if (!std::all_of(trailer + kZerosAt, trailer + bytes, [](std::uint8_t byte) { return byte == 0; })) {
    fail("qweight has a damaged trailer: bytes that must be 0 are not");
  }
}

bool holds_invalid_code(const std::uint8_t* payload, const PackedShape& shape) {
  if (shape.layout == Layout::base3) {
    return std::any_of(payload, payload + shape.payload_bytes(),
                       [](std::uint8_t byte) { return byte > kMostBase3Byte; });
  }
  std::uint32_t invalid = 0;
  for (std::int64_t i = 0; i < shape.payload_bytes(); i += 4) invalid |= invalid_codes(load_word(payload + i));
  return invalid != 0;
}

// Whether a code behind the last column is not that of weight 0.
bool has_damaged_padding(const std::uint8_t* payload, const PackedShape& shape) {
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.padded_in_features()));
  for (std::int64_t row = 0; row < shape.out_features && shape.in_features < shape.padded_in_features(); ++row) {
    unpack_code_row(payload, shape, row, codes.data());
    if (!std::all_of(codes.begin() + shape.in_features, codes.end(), [](std::uint8_t c) { return c == kZeroCode; })) {
      return true;
    }
  }
  return false;
}

// Code words of one row in payload order: word s of the row is `row_words[s * tile_rows]`.
struct PackedRow {
  std::uint8_t* first_word;
  std::int64_t word_stride;  // bytes
};

PackedRow row_of(std::uint8_t* payload, const PackedShape& shape, std::int64_t row) {
  const std::int64_t tile = row / kTileRows;
  const std::int64_t tile_rows = std::min(kTileRows, shape.out_features - tile * kTileRows);
  return {payload + tile * kTileRows * shape.payload_row_bytes + (row % kTileRows) * 4, tile_rows * 4};
}

// Some steps of a row.
struct StepRange {
  std::int64_t first;
  std::int64_t count;
};

// Codes of a range of steps of one row; nonzero where one is invalid.
std::uint32_t unpack_steps(const std::uint8_t* payload, const PackedShape& shape, std::int64_t row, StepRange range,
                           std::uint8_t* codes) {
  const PackedRow in = row_of(const_cast<std::uint8_t*>(payload), shape, row);
  const auto unpack = shape.layout == Layout::base3 ? code_rows().unpack_base3 : code_rows().unpack_two_bit;
  return unpack(in.first_word + range.first * in.word_stride, in.word_stride, range.count, codes);
}

}  // namespace

Layout parse_layout(std::string_view text) {
  if (text == "auto") return Layout::automatic;
  for (const Layout layout : kLayouts) {
    if (text == to_string(layout)) return layout;
  }
  fail("layout must be 'auto', '2bit' or '1.6bit', got '", text, "'");
}

std::string_view to_string(Layout layout) {
  switch (layout) {
    case Layout::automatic:
      return "auto";
    case Layout::two_bit:
      return "2bit";
    case Layout::base3:
      return "1.6bit";
  }
  return "unknown";
}

bool has_layout(std::int64_t in_features, Layout layout) {
  return layout != Layout::base3 ||
         payload_row_bytes(in_features, Layout::base3) < payload_row_bytes(in_features, Layout::two_bit);
}

PackedShape packed_shape(std::int64_t out_features, std::int64_t in_features, Layout layout) {
  if (out_features < 1) fail("out_features must be at least 1, got ", out_features);
  if (in_features < 1) fail("in_features must be at least 1, got ", in_features);
  if (in_features > kMaxInFeatures) fail("in_features must be at most ", kMaxInFeatures, ", got ", in_features);
  if (layout == Layout::automatic) layout = Layout::two_bit;
  if (!has_layout(in_features, layout)) {
    fail("layout '", to_string(layout), "' does not exist for ", in_features,
         " in_features: it would be no smaller than '2bit'");
  }
  return {out_features, in_features, payload_row_bytes(in_features, layout), trailer_row_bytes(out_features), layout};
}

std::uint64_t payload_checksum(const std::uint8_t* payload, std::int64_t bytes) {
  if (bytes < 0 || bytes % 4 != 0) fail("bytes must be a multiple of 4 and at least 0, got ", bytes);
  if (payload == nullptr && bytes > 0) fail("payload is null, expected memory of ", bytes, " bytes");
  // Eight interleaved sums hide the latency of the multiplications.
  constexpr int kLanes = 8;
  std::uint64_t lane_factor[kLanes + 1] = {1};
  for (int lane = 0; lane < kLanes; ++lane) lane_factor[lane + 1] = lane_factor[lane] * kChecksumFactor;

  std::uint64_t sums[kLanes] = {};
  std::uint64_t factor = 1;
  const std::int64_t words = bytes / 4;
  std::int64_t word = 0;
  for (; word + kLanes <= words; word += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += load_word(payload + 4 * (word + lane)) * factor;
    factor *= lane_factor[kLanes];
  }
  for (int lane = 0; word < words; ++word, ++lane) sums[lane] += load_word(payload + 4 * word) * factor;

  std::uint64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane] * lane_factor[lane];
  return total;
}

void pack_code_row(const std::uint8_t* codes, const PackedShape& shape, std::int64_t row, std::uint8_t* payload) {
  const PackedRow out = row_of(payload, shape, row);
  const auto pack = shape.layout == Layout::base3 ? code_rows().pack_base3 : code_rows().pack_two_bit;
  pack(codes, shape.steps(), out.first_word, out.word_stride);
}

std::uint32_t unpack_code_row(const std::uint8_t* payload, const PackedShape& shape, std::int64_t row,
                              std::uint8_t* codes) {
  return unpack_steps(payload, shape, row, {0, shape.steps()}, codes);
}

void write_trailer(const PackedShape& shape, std::uint8_t* packed) {
  std::uint8_t* trailer = packed + shape.payload_bytes();
  std::memset(trailer, 0, static_cast<std::size_t>(shape.out_features * shape.trailer_row_bytes));
  std::memcpy(trailer, kMagic, sizeof(kMagic));
  store_le(trailer + kVersionAt, kVersion, 4);
  store_le(trailer + kLayoutAt, static_cast<std::uint32_t>(shape.layout), 4);
  store_le(trailer + kOutFeaturesAt, static_cast<std::uint64_t>(shape.out_features), 8);
  store_le(trailer + kInFeaturesAt, static_cast<std::uint64_t>(shape.in_features), 8);
  store_le(trailer + kChecksumAt, payload_checksum(packed, shape.payload_bytes()), 8);
}

void check_packed_output(MatrixView packed, const PackedShape& shape) {
  check_dtype(packed.dtype, DType::uint8, "packed");
  check_shape(packed.rows, packed.cols, shape.out_features, shape.row_bytes(), "packed");
  check_view(packed, "packed");
  if (packed.row_stride != packed.cols) fail("packed must be contiguous");
}

PackedShape read_trailer(ConstMatrixView packed) {
  if (packed.dtype != DType::uint8) fail("qweight must be packed uint8, got ", to_string(packed.dtype));
  if (packed.rows < 1) fail("qweight has ", packed.rows, " rows, expected at least 1");
  check_view(packed, "qweight");
  if (packed.row_stride != packed.cols) fail("qweight must be contiguous");
  const std::int64_t trailer_bytes = trailer_row_bytes(packed.rows);
  const std::int64_t payload_bytes = packed.cols - trailer_bytes;
  if (payload_bytes < kWordBytes || payload_bytes % kWordBytes != 0) {
    fail("qweight has shape (", packed.rows, ", ", packed.cols, "), which is no packed weight: expected (", packed.rows,
         ", 4 * ceil(in_features / 16 or 20) + ", trailer_bytes, ")");
  }
  const std::uint8_t* trailer = trailer_of(packed);
  if (std::memcmp(trailer, kMagic, sizeof(kMagic)) != 0) {
    fail("qweight has a damaged trailer: it does not begin with 'BITLABQW'");
  }
  const std::uint64_t version = load_le(trailer + kVersionAt, 4);
  if (version != kVersion) fail("qweight has format version ", version, ", this BitLab reads ", kVersion);
  const std::uint64_t layout = load_le(trailer + kLayoutAt, 4);
  if (std::none_of(std::begin(kLayouts), std::end(kLayouts),
                   [&](Layout known) { return layout == static_cast<std::uint64_t>(known); })) {
    fail("qweight has the unknown layout ", layout);
  }
  const std::uint64_t out_features = load_le(trailer + kOutFeaturesAt, 8);
  if (out_features != static_cast<std::uint64_t>(packed.rows)) {
    fail("qweight has ", packed.rows, " rows, its trailer says ", out_features);
  }
  const std::uint64_t in_features = load_le(trailer + kInFeaturesAt, 8);
  if (in_features < 1 || in_features > static_cast<std::uint64_t>(kMaxInFeatures)) {
    fail("qweight has a damaged trailer: in_features is ", in_features);
  }
  const auto stated = static_cast<std::int64_t>(in_features);
  if (!has_layout(stated, static_cast<Layout>(layout))) {
    fail("qweight has a damaged trailer: layout '", to_string(static_cast<Layout>(layout)), "' does not exist for ",
         stated, " in_features");
  }
  const PackedShape shape = packed_shape(packed.rows, stated, static_cast<Layout>(layout));
  if (shape.row_bytes() != packed.cols) {
    fail("qweight has ", packed.cols, " bytes in a row, its trailer's ", in_features, " in_features take ",
         shape.row_bytes());
  }
  return shape;
}

PackedShape check_trailer(ConstMatrixView packed, std::int64_t in_features) {
  const PackedShape shape = read_trailer(packed);
  if (shape.in_features != in_features) {
    fail("in_features is ", in_features, ", but qweight was prepared for ", shape.in_features);
  }
  return shape;
}

void check_qweight(ConstMatrixView packed, std::int64_t in_features) {
  const PackedShape shape = check_trailer(packed, in_features);
  check_trailer_zeros(packed, shape);
  const auto* payload = static_cast<const std::uint8_t*>(packed.data);
  const std::uint64_t stored = load_le(payload + shape.payload_bytes() + kChecksumAt, 8);
  const std::uint64_t found = payload_checksum(payload, shape.payload_bytes());
  if (stored != found) fail("qweight is damaged: its checksum is ", found, ", its trailer says ", stored);
  if (holds_invalid_code(payload, shape)) fail_invalid_code();
  if (has_damaged_padding(payload, shape)) fail("qweight is damaged: its padding does not hold code 1");
}

void pack_weights(ConstMatrixView qweight, MatrixView packed, Layout layout) {
  check_dtype(qweight.dtype, DType::int8, "qweight");
  const PackedShape shape = packed_shape(qweight.rows, qweight.cols, layout);
  check_view(qweight, "qweight");
  check_packed_output(packed, shape);
  auto* bytes = static_cast<std::uint8_t*>(packed.data);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.padded_in_features()), kZeroCode);
  for (std::int64_t row = 0; row < shape.out_features; ++row) {
    const auto* values = reinterpret_cast<const std::int8_t*>(qweight.row(row));
    for (std::int64_t k = 0; k < shape.in_features; ++k) {
      codes[static_cast<std::size_t>(k)] = static_cast<std::uint8_t>(values[k] + 1);
      if (values[k] < -1 || values[k] > 1) {
        fail("qweight must hold -1, 0 and 1 only, got ", int{values[k]}, " at (", row, ", ", k, ")");
      }
    }
    pack_code_row(codes.data(), shape, row, bytes);
  }
  write_trailer(shape, bytes);
}

std::vector<std::uint8_t> pack_weights(ConstMatrixView qweight, Layout layout) {
  const PackedShape shape = packed_shape(qweight.rows, qweight.cols, layout);
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(shape.bytes()));
  pack_weights(qweight, MatrixView(packed.data(), shape.out_features, shape.row_bytes()), layout);
  return packed;
}

void unpack_weights(ConstMatrixView packed, MatrixView qweight, Verify verify, Executor& executor) {
  if (qweight.dtype == DType::uint8) fail("the unpacked weight must be int8 or floating, got uint8");
  if (verify == Verify::every_byte) check_qweight(packed, qweight.cols);
  unpack_columns(packed, qweight.cols, 0, qweight, executor);
}

void unpack_columns(ConstMatrixView packed, std::int64_t in_features, std::int64_t first, MatrixView columns,
                    Executor& executor) {
  if (columns.dtype == DType::uint8) fail("the unpacked weight must be int8 or floating, got uint8");
  const PackedShape shape = check_trailer(packed, in_features);
  check_shape(columns.rows, columns.cols, packed.rows, columns.cols, "the unpacked weight");
  const std::int64_t codes_a_step = step_codes(shape.layout);
  if (first < 0 || first % codes_a_step != 0 || columns.cols < 0 || columns.cols > in_features - first) {
    fail("columns ", first, " to ", first + columns.cols, " of ", in_features, ", expected a range that begins at a ",
         "multiple of ", codes_a_step);
  }
  check_view(columns, "the unpacked weight");
  const StepRange range = {first / codes_a_step, ceil_div(columns.cols, codes_a_step)};
  const std::int64_t tiles = ceil_div(shape.out_features, kTileRows);
  parallel_ranges(executor, tiles, std::max<std::int64_t>(1, 4096 / std::max<std::int64_t>(1, columns.cols)),
                  [&](std::int64_t begin, std::int64_t end) {
                    std::vector<std::uint8_t> codes(static_cast<std::size_t>(range.count * codes_a_step));
                    const std::int64_t last = std::min(shape.out_features, end * kTileRows);
                    for (std::int64_t row = begin * kTileRows; row < last; ++row) {
                      unpack_steps(static_cast<const std::uint8_t*>(packed.data), shape, row, range, codes.data());
                      code_rows().weights_of(codes.data(), columns.cols, columns.dtype, columns.row(row));
                    }
                  });
}

std::vector<std::uint8_t> repack(ConstMatrixView packed, std::int64_t in_features, Layout layout) {
  const PackedShape shape = check_trailer(packed, in_features);
  std::vector<std::int8_t> codes(static_cast<std::size_t>(shape.out_features * shape.in_features));
  const MatrixView qweight(codes.data(), shape.out_features, shape.in_features);
  unpack_weights(packed, qweight);
  return pack_weights(qweight, layout);
}

}  // namespace bitcore
