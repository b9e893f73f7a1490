// The packed weight, byte by byte.
#include "bitcore/ops/packing.h"

#include <algorithm>

#include "layouts.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::Codes;
using testing::expect_error;
using testing::layouts_of;
using testing::random_codes;

struct Size {
  std::int64_t out_features, in_features;
};

ConstMatrixView view(const std::vector<std::uint8_t>& packed, std::int64_t rows) {
  return {packed.data(), rows, static_cast<std::int64_t>(packed.size()) / rows};
}

std::uint8_t slow_code(const Codes& codes, Size size, std::int64_t row, std::int64_t k) {
  return k < size.in_features
             ? static_cast<std::uint8_t>(codes[static_cast<std::size_t>(row * size.in_features + k)] + 1)
             : std::uint8_t{1};
}

// The payload by the definition: tiles of 16 rows, steps of 16 or 20 k, a word a row; field or digit f of byte j holds
// k = 16 s + 4 f + j or 20 s + 4 f + j.
std::vector<std::uint8_t> slow_payload(const Codes& codes, Size size, Layout layout) {
  std::vector<std::uint8_t> payload;
  const int fields = layout == Layout::base3 ? 5 : 4;
  const int worth = layout == Layout::base3 ? 3 : 4;  // of a field, in units of the one before
  const std::int64_t step_size = 4 * fields;
  const std::int64_t steps = (size.in_features + step_size - 1) / step_size;
  for (std::int64_t tile = 0; tile < size.out_features; tile += 16) {
    const std::int64_t last = std::min(size.out_features, tile + 16);
    for (std::int64_t step = 0; step < steps; ++step) {
      for (std::int64_t row = tile; row < last; ++row) {
        for (int byte = 0; byte < 4; ++byte) {
          int value = 0;
          for (int field = fields - 1; field >= 0; --field) {
            value = worth * value + slow_code(codes, size, row, step_size * step + 4 * field + byte);
          }
          payload.push_back(static_cast<std::uint8_t>(value));
        }
      }
    }
  }
  return payload;
}

class Packing : public ::testing::TestWithParam<Size> {};

TEST_P(Packing, PayloadIsTheDocumentedOne) {
  const Size size = GetParam();
  const Codes codes = random_codes(size.out_features * size.in_features, 1);
  for (const Layout layout : layouts_of(size.in_features)) {
    const std::vector<std::uint8_t> packed = pack_weights({codes.data(), size.out_features, size.in_features}, layout);
    const std::vector<std::uint8_t> expected = slow_payload(codes, size, layout);
    const PackedShape shape = packed_shape(size.out_features, size.in_features, layout);
    ASSERT_EQ(static_cast<std::int64_t>(expected.size()), shape.payload_bytes());
    const std::int64_t step = layout == Layout::base3 ? 20 : 16;
    ASSERT_EQ(static_cast<std::int64_t>(packed.size()),
              size.out_features *
                  (4 * ((size.in_features + step - 1) / step) + (64 + size.out_features - 1) / size.out_features));
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), packed.begin()));
  }
}

TEST_P(Packing, UnpackAndRepackInvertIt) {
  const Size size = GetParam();
  const Codes codes = random_codes(size.out_features * size.in_features, 2);
  for (const Layout layout : layouts_of(size.in_features)) {
    const std::vector<std::uint8_t> packed = pack_weights({codes.data(), size.out_features, size.in_features}, layout);
    Codes unpacked(codes.size(), 9);
    unpack_weights(view(packed, size.out_features), {unpacked.data(), size.out_features, size.in_features});
    EXPECT_EQ(unpacked, codes);
    for (const Layout other : layouts_of(size.in_features)) {
      EXPECT_EQ(repack(view(packed, size.out_features), size.in_features, other),
                pack_weights({codes.data(), size.out_features, size.in_features}, other));
    }
  }
}

TEST_P(Packing, ColumnsAreThoseOfTheWhole) {
  const Size& size = GetParam();
  const Codes codes = random_codes(size.out_features * size.in_features, 3);
  for (const Layout layout : kLayouts) {
    if (!has_layout(size.in_features, layout)) continue;
    const auto packed = pack_weights({codes.data(), size.out_features, size.in_features}, layout);
    const std::int64_t step = step_codes(layout);
    for (std::int64_t first = 0; first < size.in_features; first += step) {
      const std::int64_t cols = std::min(size.in_features - first, 2 * step + 1);
      Codes part(static_cast<std::size_t>(size.out_features * cols));
      unpack_columns(view(packed, size.out_features), size.in_features, first, {part.data(), size.out_features, cols});
      for (std::int64_t row = 0; row < size.out_features; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) {
          ASSERT_EQ(part[static_cast<std::size_t>(row * cols + col)],
                    codes[static_cast<std::size_t>(row * size.in_features + first + col)]);
        }
      }
    }
    Codes one(static_cast<std::size_t>(size.out_features));
    const auto expect_refused = [&](std::int64_t first, std::int64_t cols) {
      EXPECT_THROW(unpack_columns(view(packed, size.out_features), size.in_features, first,
                                  {one.data(), size.out_features, cols}),
                   QuantizationError);
    };
    expect_refused(1, 1);
    expect_refused(-step, 1);
    expect_refused(0, size.in_features + 1);
  }
}

TEST(Layouts, TheSmallerOneExists) {
  for (std::int64_t in_features = 1; in_features <= 1000; ++in_features) {
    const std::int64_t two_bit = packed_shape(1, in_features, Layout::two_bit).payload_row_bytes;
    const std::int64_t base3 = 4 * ((in_features + 19) / 20);
    EXPECT_EQ(has_layout(in_features, Layout::base3), base3 < two_bit) << in_features;
    EXPECT_TRUE(in_features < 65 || has_layout(in_features, Layout::base3)) << in_features;
    if (base3 < two_bit) {
      EXPECT_EQ(packed_shape(1, in_features, Layout::base3).payload_row_bytes, base3);
    } else {
      expect_error<QuantizationError>([&] { packed_shape(1, in_features, Layout::base3); },
                                      {"1.6bit", std::to_string(in_features)});
    }
  }
}

TEST(Layouts, NamesAreReadBack) {
  for (const Layout layout : {Layout::automatic, Layout::two_bit, Layout::base3}) {
    EXPECT_EQ(parse_layout(to_string(layout)), layout);
  }
  expect_error<QuantizationError>([] { parse_layout("3bit"); }, {"layout", "'auto', '2bit' or '1.6bit'", "3bit"});
}

// Every byte value, in every place of a step: the digits it has, or a refusal.
TEST(Layouts, EveryByteOfBase3) {
  const std::int64_t in_features = 80;
  const Codes zeros(static_cast<std::size_t>(in_features), 0);
  std::vector<std::uint8_t> packed = pack_weights({zeros.data(), 1, in_features}, Layout::base3);
  for (std::size_t place = 0; place < 16; ++place) {
    for (int byte = 0; byte < 256; ++byte) {
      std::vector<std::uint8_t> changed = packed;
      changed[place] = static_cast<std::uint8_t>(byte);
      const std::uint64_t checksum = payload_checksum(changed.data(), 16);
      for (std::size_t i = 0; i < 8; ++i) changed[16 + 32 + i] = static_cast<std::uint8_t>(checksum >> (8 * i));
      Codes codes(zeros.size());
      const auto unpack = [&] { unpack_weights(view(changed, 1), {codes.data(), 1, in_features}); };
      if (byte > 242) {
        expect_error<QuantizationError>(unpack, {"invalid code"});
        continue;
      }
      unpack();
      int rest = byte;
      for (std::size_t digit = 0; digit < 5; ++digit, rest /= 3) {
        const std::size_t k = 20 * (place / 4) + 4 * digit + place % 4;
        EXPECT_EQ(codes[k], rest % 3 - 1) << "byte " << byte << " k " << k;
      }
    }
  }
}

TEST_P(Packing, EveryChangedByteIsFound) {
  const Size size = GetParam();
  const Codes codes = random_codes(size.out_features * size.in_features, 3);
  for (const Layout layout : layouts_of(size.in_features)) {
    std::vector<std::uint8_t> packed = pack_weights({codes.data(), size.out_features, size.in_features}, layout);
    check_qweight(view(packed, size.out_features), size.in_features);
    const std::size_t step = std::max<std::size_t>(1, packed.size() / 257);
    for (std::size_t i = 0; i<packed.size(); i += i + 200> packed.size() ? 1 : step) {
      for (const std::uint8_t change : {0x01, 0x10, 0xff}) {
        packed[i] ^= change;
        EXPECT_THROW(check_qweight(view(packed, size.out_features), size.in_features), QuantizationError) << i;
        packed[i] ^= change;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, Packing,
                         ::testing::Values(Size{1, 1}, Size{1, 16}, Size{2, 17}, Size{15, 33}, Size{16, 16},
                                           Size{17, 5}, Size{31, 100}, Size{63, 64}, Size{64, 65}, Size{65, 127},
                                           Size{200, 3}));

TEST(PackingVerify, MayCheckTheTrailerOnly) {
  const Codes codes(6, 0);
  std::vector<std::uint8_t> packed = pack_weights({codes.data(), 2, 3});
  packed[0] = 0x57;  // code 3, and a checksum that does not fit
  Codes unpacked(6);
  EXPECT_THROW(unpack_weights(view(packed, 2), {unpacked.data(), 2, 3}), QuantizationError);
  unpack_weights(view(packed, 2), {unpacked.data(), 2, 3}, Verify::trailer);
  EXPECT_EQ(unpacked, (Codes{2, 0, 0, 0, 0, 0}));
  packed[8] = 0;  // magic
  EXPECT_THROW(unpack_weights(view(packed, 2), {unpacked.data(), 2, 3}, Verify::trailer), QuantizationError);
}

TEST(PackingTrailer, IsTheDocumentedOne) {
  const Codes codes = {1, 0, -1};
  const std::vector<std::uint8_t> packed = pack_weights({codes.data(), 1, 3});
  ASSERT_EQ(packed.size(), 4u + 64u);
  // Codes 2, 1, 0 in the first fields of bytes 0 to 2; everything else is padding 1: 0x54 | code.
  const std::vector<std::uint8_t> payload = {0x56, 0x55, 0x54, 0x55};
  EXPECT_TRUE(std::equal(payload.begin(), payload.end(), packed.begin()));
  const std::vector<std::uint8_t> header = {'B', 'I', 'T', 'L', 'A', 'B', 'Q', 'W', 1, 0, 0, 0, 1, 0, 0, 0,
                                            1,   0,   0,   0,   0,   0,   0,   0,   3, 0, 0, 0, 0, 0, 0, 0};
  EXPECT_TRUE(std::equal(header.begin(), header.end(), packed.begin() + 4));
  const std::vector<std::uint8_t> checksum = {0x56, 0x55, 0x54, 0x55, 0, 0, 0, 0};  // one word times P^0
  EXPECT_TRUE(std::equal(checksum.begin(), checksum.end(), packed.begin() + 36));
  EXPECT_TRUE(std::all_of(packed.begin() + 44, packed.end(), [](std::uint8_t byte) { return byte == 0; }));
}

TEST(PackingChecksum, IsThePolynomial) {
  std::vector<std::uint8_t> bytes(4 * 29);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(37 * i + 11);
  std::uint64_t expected = 0;
  for (std::size_t word = bytes.size() / 4; word-- > 0;) {  // Horner, from the last word
    std::uint64_t value = 0;
    for (std::size_t byte = 4; byte-- > 0;) value = value << 8 | bytes[4 * word + byte];
    expected = expected * 0x9E3779B97F4A7C15u + value;
  }
  EXPECT_EQ(payload_checksum(bytes.data(), static_cast<std::int64_t>(bytes.size())), expected);
}

TEST(PackingErrors, NameTheArgumentAndBothValues) {
  const Codes codes(6, 0);
  const Codes wrong = {0, 0, 2, 0, 0, 0};
  expect_error<QuantizationError>([&] { pack_weights({wrong.data(), 2, 3}); }, {"qweight", "got 2", "(0, 2)"});
  const std::vector<float> floats(6);
  expect_error<QuantizationError>([&] { pack_weights({floats.data(), 2, 3}); }, {"qweight", "int8", "float32"});
  expect_error<QuantizationError>([&] { pack_weights({codes.data(), 0, 3}); }, {"out_features", "0"});
  expect_error<QuantizationError>([&] { packed_shape(1, kMaxInFeatures + 1); },
                                  {"in_features", "16777215", "16777216"});
  expect_error<QuantizationError>([] { parse_layout("3bit"); }, {"layout", "auto", "3bit"});

  std::vector<std::uint8_t> packed = pack_weights({codes.data(), 2, 3});
  expect_error<QuantizationError>([&] { check_qweight(view(packed, 2), 4); }, {"4", "3"});
  expect_error<QuantizationError>([&] { check_qweight({packed.data(), 2, 7}, 3); }, {"qweight", "(2, 7)"});
  packed[10] = 9;  // version, behind 8 bytes of payload and 8 of magic is 16
  expect_error<QuantizationError>([&] { check_qweight(view(packed, 2), 3); }, {"trailer"});
}

}  // namespace
}  // namespace bitcore
