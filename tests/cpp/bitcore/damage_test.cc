// Damaged packed weights: check_qweight refuses every change of any byte; forward refuses it, or reads ternary weights,
// on every kernel the same.
#include <algorithm>
#include <optional>

#include "bitcore/kernels/registry.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "layouts.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::bits_of;
using testing::Codes;
using testing::expect_error;
using testing::Floats;
using testing::is_valid_payload_byte;
using testing::layouts_of;
using testing::random_codes;

// Offsets in the trailer, of docs/packed-format.md.
constexpr std::int64_t kVersionAt = 8, kLayoutAt = 12, kOutFeaturesAt = 16, kInFeaturesAt = 24, kChecksumAt = 32,
                       kZerosAt = 40;

struct Size {
  std::int64_t out_features, in_features;
};

// A packed weight, its codes, and x of small integers: float32 sums of them are exact, so that every kernel of a dtype
// returns the same bits.
struct Weight {
  Size size;
  Codes codes;
  std::vector<std::uint8_t> packed;
  PackedShape shape;

  Weight(Size weight_size, Layout layout)
      : size(weight_size),
        codes(random_codes(size.out_features * size.in_features, 7)),
        packed(pack_weights({codes.data(), size.out_features, size.in_features}, layout)),
        shape(packed_shape(size.out_features, size.in_features, layout)) {}

  ConstMatrixView view() const { return {packed.data(), size.out_features, shape.row_bytes()}; }
  std::uint8_t& trailer(std::int64_t offset) {
    return packed[static_cast<std::size_t>(shape.payload_bytes() + offset)];
  }
  std::int64_t trailer_bytes() const { return shape.bytes() - shape.payload_bytes(); }

  void repair_checksum() {
    const std::uint64_t checksum = payload_checksum(packed.data(), shape.payload_bytes());
    for (int i = 0; i < 8; ++i) trailer(kChecksumAt + i) = static_cast<std::uint8_t>(checksum >> (8 * i));
  }

  bool is_whole() const {
    try {
      check_qweight(view(), size.in_features);
      return true;
    } catch (const QuantizationError&) {
      return false;
    }
  }
};

// y, or nothing where forward refuses the weight.
std::optional<Floats> try_forward(ConstMatrixView qweight, std::int64_t in_features, std::int64_t tokens,
                                  const BitQuantConfig& config, std::string_view kernel) {
  Floats x(static_cast<std::size_t>(tokens * in_features));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 5 % 13) - 6.0f;
  Floats y(static_cast<std::size_t>(tokens * qweight.rows));
  const float scale = 0.5f;
  try {
    bitlinear::forward({x.data(), tokens, in_features}, std::span(&scale, 1), qweight, {}, config,
                       {y.data(), tokens, qweight.rows}, {&serial_executor(), kernel});
    return y;
  } catch (const QuantizationError&) {
    return std::nullopt;
  }
}

struct KernelCase {
  std::string kernel;
  BitQuantConfig config;
};

const std::vector<KernelCase>& kernel_cases() {
  static const std::vector<KernelCase> cases = [] {
    std::vector<KernelCase> all;
    for (const ActivationDtype dtype : {ActivationDtype::int8, ActivationDtype::float32}) {
      const BitQuantConfig config{.activation_dtype = dtype, .activation_granularity = Granularity::per_channel};
      for (const auto& kernel : KernelRegistry::all_kernels()) {
        if (kernel->is_supported() && kernel->is_compatible_with(config)) {
          all.push_back({std::string(kernel->name()), config});
        }
      }
    }
    return all;
  }();
  return cases;
}

// Every other value of a byte; of a byte of a bigger weight each flipped bit and a few more.
std::vector<std::uint8_t> other_values(std::uint8_t value, bool all) {
  std::vector<std::uint8_t> others;
  if (all) {
    for (int other = 0; other < 256; ++other) others.push_back(static_cast<std::uint8_t>(other));
  } else {
    for (int bit = 0; bit < 8; ++bit) others.push_back(static_cast<std::uint8_t>(value ^ (1 << bit)));
    others.insert(others.end(), {0x00, 0xaa, 0xf2, 0xf3, 0xff});
  }
  std::erase(others, value);
  return others;
}

// What forward on every kernel makes of a payload whose checksum no longer fits.
void expect_refused_or_ternary(const Weight& weight, bool valid, std::int64_t tokens, const std::string& where) {
  Codes codes(weight.codes.size());
  const MatrixView unpacked(codes.data(), weight.size.out_features, weight.size.in_features);
  if (valid) unpack_weights(weight.view(), unpacked, Verify::trailer);
  for (const std::int8_t code : codes) ASSERT_TRUE(code >= -1 && code <= 1) << where;
  std::optional<Floats> expected[2];  // of float32 and int8 activations
  for (const KernelCase& c : kernel_cases()) {
    const auto y = try_forward(weight.view(), weight.size.in_features, tokens, c.config, c.kernel);
    ASSERT_EQ(y.has_value(), valid) << where << " " << c.kernel;
    if (!valid) continue;
    auto& reference = expected[c.config.activation_dtype == ActivationDtype::int8];
    if (!reference) {
      reference = try_forward(unpacked, weight.size.in_features, tokens, c.config, "ReferenceKernel");
    }
    ASSERT_EQ(bits_of(*y), bits_of(reference.value())) << where << " " << c.kernel;
  }
}

class Damage : public ::testing::TestWithParam<Size> {};

TEST_P(Damage, OfThePayload) {
  for (const Layout layout : layouts_of(GetParam().in_features)) {
    Weight weight(GetParam(), layout);
    ASSERT_TRUE(weight.is_whole());
    int refused = 0, read = 0;
    for (std::int64_t i = 0; i < weight.shape.payload_bytes(); ++i) {
      std::uint8_t& byte = weight.packed[static_cast<std::size_t>(i)];
      const std::uint8_t original = byte;
      for (const std::uint8_t value : other_values(original, weight.shape.payload_bytes() <= 40)) {
        byte = value;
        const std::string where = std::string(to_string(layout)) + ", byte " + std::to_string(i) + " is " +
                                  std::to_string(value) + " instead of " + std::to_string(original);
        ASSERT_FALSE(weight.is_whole()) << where;
        const bool valid = is_valid_payload_byte(layout, value);
        ++(valid ? read : refused);
        // One row of x and 17 take different ways through the kernels.
        expect_refused_or_ternary(weight, valid, value % 2 == 0 ? 1 : 17, where);
        if (HasFatalFailure()) return;
      }
      byte = original;
    }
    EXPECT_GT(refused, 0);
    EXPECT_GT(read, 0);
    EXPECT_TRUE(weight.is_whole());
  }
}

TEST_P(Damage, OfTheTrailer) {
  for (const Layout layout : layouts_of(GetParam().in_features)) {
    Weight weight(GetParam(), layout);
    std::vector<std::optional<Floats>> expected;
    for (const KernelCase& c : kernel_cases()) {
      expected.push_back(try_forward(weight.view(), weight.size.in_features, 1, c.config, c.kernel));
    }
    for (std::int64_t i = 0; i < weight.trailer_bytes(); ++i) {
      const std::uint8_t original = weight.trailer(i);
      for (const std::uint8_t value : other_values(original, true)) {
        weight.trailer(i) = value;
        ASSERT_FALSE(weight.is_whole()) << i << " " << int{value};
        const std::size_t k = static_cast<std::size_t>(value) % kernel_cases().size();
        const KernelCase& c = kernel_cases()[k];
        const auto y = try_forward(weight.view(), weight.size.in_features, 1, c.config, c.kernel);
        // forward does not read the checksum and the zeros: they change nothing. All else it refuses.
        ASSERT_EQ(y.has_value(), i >= kChecksumAt) << i << " " << int{value} << " " << c.kernel;
        if (y) {
          ASSERT_EQ(bits_of(*y), bits_of(*expected[k])) << i << " " << int{value} << " " << c.kernel;
        }
      }
      weight.trailer(i) = original;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sizes, Damage, ::testing::Values(Size{1, 1}, Size{2, 66}, Size{3, 17}, Size{5, 20}, Size{18, 33}, Size{33, 40}),
    [](const auto& info) {
      return std::to_string(info.param.out_features) + "x" + std::to_string(info.param.in_features);
    });

// Each thing that check_qweight reads, damaged alone; the error names it.
TEST(CheckQweight, SaysWhatIsDamaged) {
  for (const Layout layout : testing::kLayouts) {
    const Size size{6, 90};
    const Weight whole(size, layout);
    const auto expect_damage = [&](const auto& damage, const std::vector<std::string>& parts) {
      Weight weight = whole;
      damage(weight);
      expect_error<QuantizationError>([&] { check_qweight(weight.view(), size.in_features); }, parts);
    };
    const auto set = [](std::int64_t offset, std::uint8_t value) {
      return [=](Weight& weight) { weight.trailer(offset) = value; };
    };
    check_qweight(whole.view(), size.in_features);
    expect_damage(set(0, 'b'), {"trailer", "BITLABQW"});
    expect_damage(set(kVersionAt, 9), {"version", "9"});
    expect_damage(set(kLayoutAt, 77), {"layout", "77"});
    expect_damage(set(kOutFeaturesAt, 7), {"6 rows", "7"});
    expect_damage(set(kInFeaturesAt, 0), {"in_features", "0"});
    expect_damage(set(kInFeaturesAt + 7, 0x80), {"in_features"});
    expect_damage(set(kInFeaturesAt + 1, 1), {"in_features", "346"});
    expect_damage(set(kChecksumAt + 3, whole.packed[static_cast<std::size_t>(whole.shape.payload_bytes()) + 35] ^ 1),
                  {"checksum"});
    expect_damage(set(kZerosAt, 1), {"0"});
    expect_damage(set(whole.trailer_bytes() - 1, 1), {"0"});
    expect_damage([](Weight& weight) { weight.packed[5] ^= 1; }, {"checksum"});
    // A code that does not exist under a checksum that fits.
    expect_damage(
        [](Weight& weight) {
          weight.packed[5] = 0xff;
          weight.repair_checksum();
        },
        {"invalid code"});
    // Padding that is no code 1: 90 columns fill 5.6 steps of 16, 4.5 of 20. The last byte holds the last field.
    expect_damage(
        [](Weight& weight) {
          weight.packed[static_cast<std::size_t>(weight.shape.payload_bytes()) - 1] = 0;
          weight.repair_checksum();
        },
        {"padding"});
  }
}

TEST(CheckQweight, RefusesWhatIsNoPackedWeight) {
  for (const Layout layout : testing::kLayouts) {
    const Weight weight({6, 90}, layout);
    const std::uint8_t* bytes = weight.packed.data();
    const std::int64_t columns = weight.shape.row_bytes();
    check_qweight({bytes, 6, columns}, 90);
    for (const std::int64_t in_features :
         {std::int64_t{-1}, std::int64_t{0}, std::int64_t{89}, std::int64_t{91}, kMaxInFeatures, kMaxInFeatures + 1}) {
      expect_error<QuantizationError>(
          [&] {
            check_qweight({bytes, 6, columns}, in_features);
          },
          {"in_features", std::to_string(in_features), "90"});
    }
    for (const std::int64_t rows : {std::int64_t{0}, std::int64_t{1}, std::int64_t{5}}) {
      EXPECT_THROW(check_qweight({bytes, rows, columns}, 90), QuantizationError) << rows;
    }
    for (std::int64_t fewer = 0; fewer < columns; ++fewer) {
      EXPECT_THROW(check_qweight({bytes, 6, fewer}, 90), QuantizationError) << fewer;
    }
    expect_error<QuantizationError>([&] { check_qweight({bytes, DType::int8, 6, columns, columns}, 90); }, {"int8"});
    expect_error<QuantizationError>(
        [&] {
          check_qweight({bytes, DType::uint8, 3, columns, 2 * columns}, 90);
        },
        {"contiguous"});
  }
}

}  // namespace
}  // namespace bitcore
