// Every kernel that this CPU runs against ReferenceKernel: the same bits for any shape, values, layout and number of
// threads; the tile count proves which kernel ran.
#include <algorithm>
#include <limits>
#include <memory>
#include <tuple>

#include "bitcore/kernels/base3_recode-inl.h"
#include "bitcore/kernels/int8_avxvnni_evex.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/kernels/tile_functions.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "layouts.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::bits_of;
using testing::Codes;
using testing::Floats;
using testing::layouts_of;
using testing::random_codes;
using testing::random_floats;
using testing::random_scales;
using testing::typical_configs;

struct Shape {
  std::int64_t tokens, out_features, in_features;
};

// A linear layer with its codes known, and what its calls return.
struct Layer {
  BitQuantConfig config;
  std::vector<std::uint8_t> packed;
  FloatVector scale;
  Floats bias;
  std::int64_t out_features, in_features;
  Layout layout = Layout::two_bit;

  Layer(const BitQuantConfig& layer_config, std::int64_t rows, std::int64_t cols, unsigned seed)
      : config(layer_config), out_features(rows), in_features(cols) {
    packed = pack_weights({random_codes(rows * cols, seed).data(), rows, cols}, layout);
    scale = random_scales(rows, cols, config, seed + 1);
    bias = random_floats(rows, seed + 2);
  }

  ConstMatrixView qweight() const {
    return {packed.data(), out_features, packed_shape(out_features, in_features, layout).row_bytes()};
  }

  Layer in_layout(Layout other) const {
    Layer copy = *this;
    copy.packed = repack(qweight(), in_features, other);
    copy.layout = other;
    return copy;
  }

  Floats forward(const Floats& x, std::string_view kernel, Executor* executor = nullptr) const {
    const std::int64_t tokens = static_cast<std::int64_t>(x.size()) / in_features;
    Floats y(static_cast<std::size_t>(tokens * out_features), 12345.0f);
    bitlinear::forward({x.data(), tokens, in_features}, scale, qweight(), {bias.data(), out_features}, config,
                       {y.data(), tokens, out_features}, {executor, kernel});
    return y;
  }
};

// Kernels that are built for these tests alone.
const std::vector<KernelRegistry::KernelPtr>& test_kernels() {
#if defined(__x86_64__)
  static const std::vector<KernelRegistry::KernelPtr> kernels = {make_int8_avxvnni_evex_kernel()};
#else
  static const std::vector<KernelRegistry::KernelPtr> kernels;
#endif
  return kernels;
}

// Registers them while one of this file's suites runs.
class WithTestKernels : public ::testing::Test {
 public:
  static void SetUpTestSuite() {
    for (const auto& kernel : test_kernels()) KernelRegistry::register_kernel(kernel);
  }
  static void TearDownTestSuite() {
    for (const auto& kernel : test_kernels()) KernelRegistry::unregister_kernel(kernel->name());
  }
};

class Kernels : public WithTestKernels {};

// What goes through code of its own: with and without groups.
constexpr BitQuantConfig kTypicalConfigs[] = {
    {},
    {.activation_dtype = ActivationDtype::float32},
    {Granularity::per_group, ActivationDtype::int8, Granularity::per_group, 32},
    {Granularity::per_group, ActivationDtype::float32, Granularity::per_channel, 32},
};

std::vector<std::string> kernels_for(const BitQuantConfig& config) {
  std::vector<std::string> names;
  for (const auto& kernel : KernelRegistry::all_kernels()) {
    if (kernel->is_supported() && kernel->is_compatible_with(config)) names.emplace_back(kernel->name());
  }
  return names;
}

std::uint64_t tile_calls(const std::string& name) {
  for (const auto& kernel : KernelRegistry::all_kernels()) {
    if (kernel->name() == name) return kernel->tile_calls();
  }
  return 0;
}

void check_all_kernels(const Layer& layer, const Floats& x, const Floats& expected) {
  ThreadPool two_threads(2);
  for (const std::string& kernel : kernels_for(layer.config)) {
    SCOPED_TRACE(kernel);
    const std::uint64_t before = tile_calls(kernel);
    const Floats one = layer.forward(x, kernel, &serial_executor());
    if (!x.empty()) {
      EXPECT_GT(tile_calls(kernel), before) << "another kernel ran";
    }
    EXPECT_EQ(bits_of(one), bits_of(expected));
    EXPECT_EQ(bits_of(layer.forward(x, kernel, &two_threads)), bits_of(one)) << "two threads";
    EXPECT_EQ(bits_of(layer.forward(x, kernel)), bits_of(one)) << "default executor";
  }
}

// In every layout, the reference included.
void check_all_kernels(const Layer& layer, const Floats& x) {
  const Floats expected = layer.forward(x, "ReferenceKernel", &serial_executor());
  for (const Layout layout : layouts_of(layer.in_features)) {
    SCOPED_TRACE(to_string(layout));
    check_all_kernels(layer.in_layout(layout), x, expected);
  }
}

// The other tests walk over the kernels that run here; this one says which do not.
class EveryKernel : public WithTestKernels, public ::testing::WithParamInterface<std::string> {};

TEST_P(EveryKernel, RunsItsConfigs) {
  const auto all = KernelRegistry::all_kernels();
  const auto kernel = *std::find_if(all.begin(), all.end(), [](const auto& k) { return k->name() == GetParam(); });
  EXPECT_EQ(kernel->path().empty(), kernel->name() == "ReferenceKernel");
  if (!kernel->is_supported()) GTEST_SKIP() << "this CPU lacks " << kernel->requirement();
  int configs = 0;
  for (const BitQuantConfig& config : all_configs()) {
    if (!kernel->is_compatible_with(config)) continue;
    ++configs;
    const std::uint64_t before = kernel->tile_calls();
    Layer(config, 40, 50, 1).forward(random_floats(3 * 50, 2), GetParam());
    EXPECT_GT(kernel->tile_calls(), before);
  }
  EXPECT_GE(configs, 4);
}

std::vector<std::string> all_names() {
  std::vector<std::string> names;
  for (const auto& kernel : KernelRegistry::all_kernels()) names.emplace_back(kernel->name());
  for (const auto& kernel : test_kernels()) names.emplace_back(kernel->name());
  return names;
}

INSTANTIATE_TEST_SUITE_P(All, EveryKernel, ::testing::ValuesIn(all_names()),
                         [](const auto& name) { return name.param; });

class KernelShapes : public WithTestKernels, public ::testing::WithParamInterface<std::tuple<int, Shape>> {};

TEST_P(KernelShapes, MatchReference) {
  const BitQuantConfig config = typical_configs()[static_cast<std::size_t>(std::get<0>(GetParam()))];
  const Shape shape = std::get<1>(GetParam());
  const Layer layer(config, shape.out_features, shape.in_features, 7);
  check_all_kernels(layer, random_floats(shape.tokens * shape.in_features, 11));
}

// One below and above every block size of the kernels: 2, 4 and 12 tokens, 16 and 32 rows, steps of 16, blocks of 256
// and 512 k; primes; no tokens at all; enough work for two threads.
INSTANTIATE_TEST_SUITE_P(
    Sweep, KernelShapes,
    ::testing::Combine(::testing::Range(0, 13),
                       ::testing::Values(Shape{0, 5, 7}, Shape{1, 1, 1}, Shape{1, 17, 15}, Shape{2, 16, 16},
                                         Shape{3, 15, 17}, Shape{4, 31, 63}, Shape{5, 32, 65}, Shape{7, 33, 127},
                                         Shape{8, 48, 128}, Shape{11, 47, 255}, Shape{12, 64, 256}, Shape{13, 65, 257},
                                         Shape{23, 13, 511}, Shape{24, 97, 512}, Shape{25, 100, 513},
                                         Shape{37, 3, 1031}, Shape{131, 1, 19}, Shape{97, 257, 1025},
                                         Shape{1, 1021, 2053}, Shape{600, 50, 100})),
    [](const auto& test) {
      const Shape& shape = std::get<1>(test.param);
      return std::to_string(shape.tokens) + "x" + std::to_string(shape.out_features) + "x" +
             std::to_string(shape.in_features) + "_config" + std::to_string(std::get<0>(test.param));
    });

// Up to two of the largest tiles and one more.
TEST_F(Kernels, EveryTokenCount) {
  for (const BitQuantConfig& config : kTypicalConfigs) {
    const Layer layer(config, 37, 83, 3);
    for (std::int64_t tokens = 1; tokens <= 2 * kMostDirectTokens + 1; ++tokens) {
      SCOPED_TRACE(tokens);
      check_all_kernels(layer, random_floats(tokens * 83, static_cast<unsigned>(tokens)));
    }
  }
}

// More weights than a panel of packed ones holds, for several tiles of tokens and for one.
TEST_F(Kernels, SeveralPanelsOfPackedWeights) {
  for (const BitQuantConfig& config : kTypicalConfigs) {
    if (config.activation_dtype == ActivationDtype::float32) continue;
    const Layer layer(config, 661, 1203, 3);
    for (const std::int64_t tokens : {1, 49}) {
      SCOPED_TRACE(tokens);
      check_all_kernels(layer, random_floats(tokens * 1203, static_cast<unsigned>(tokens)));
    }
  }
}

// One more than the 64 rows of the widest panel: it is left with any number of rows and of tiles.
TEST_F(Kernels, EveryNumberOfOutFeatures) {
  for (const BitQuantConfig& config : kTypicalConfigs) {
    for (std::int64_t out_features = 1; out_features <= 65; ++out_features) {
      SCOPED_TRACE(out_features);
      const Layer layer(config, out_features, 35, 4);
      for (const std::int64_t tokens : {1, 14}) check_all_kernels(layer, random_floats(tokens * 35, 6));
    }
  }
}

// At 1.6 bits every byte that exists is at each of the 64 places of a step once.
TEST_F(Kernels, EveryByteOfFiveCodes) {
  constexpr std::int64_t kBytes = 243, kInFeatures = 20, kRows = kBytes * kTileRows;
  Codes codes(kRows * kInFeatures);
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t k = 0, power = 1; k < kInFeatures; ++k) {
      if (k > 0 && k % 4 == 0) power *= 3;
      const std::int64_t byte = (row / kTileRows + row % kTileRows + 16 * (k % 4)) % kBytes;
      codes[static_cast<std::size_t>(row * kInFeatures + k)] = static_cast<std::int8_t>(byte / power % 3 - 1);
    }
  }
  Layer layer({}, kRows, kInFeatures, 1);
  layer.packed = pack_weights({codes.data(), kRows, kInFeatures});
  for (const std::int64_t tokens : {1, 2, 3, 8, 13}) check_all_kernels(layer, random_floats(tokens * kInFeatures, 2));
}

TEST_F(Kernels, ExtremeValues) {
  const float huge = std::numeric_limits<float>::max();
  const float denormal = std::numeric_limits<float>::denorm_min();
  for (const BitQuantConfig& config : typical_configs()) {
    const Layer layer(config, 33, 70, 5);
    for (const std::int64_t tokens : {1, 3, 6, 14, 40}) {
      SCOPED_TRACE(to_string(config) + " tokens " + std::to_string(tokens));
      Floats x = random_floats(tokens * 70, 9);
      for (float& value : x) value = value < 0.0f ? -1e30f : 1e30f;  // all codes -127 or 127
      check_all_kernels(layer, x);
      if (config.activation_dtype == ActivationDtype::int8) {
        for (float& value : x) value = value < 0.0f ? -huge : huge;
        check_all_kernels(layer, x);
      }
      for (float& value : x) value = value < 0.0f ? -denormal : denormal;
      check_all_kernels(layer, x);
      std::fill(x.begin(), x.end(), 0.0f);
      check_all_kernels(layer, x);
      x[0] = 1e-30f;
      check_all_kernels(layer, x);
    }
  }
}

TEST_F(Kernels, NonFiniteRows) {
  for (const BitQuantConfig& config : typical_configs()) {
    const Layer layer(config, 20, 40, 6);
    for (const std::int64_t tokens : {3, 30}) {
      for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity()}) {
        SCOPED_TRACE(to_string(config));
        Floats x = random_floats(tokens * 40, 8);
        x[45] = bad;  // row 1
        check_all_kernels(layer, x);
        const Floats y = layer.forward(x, "");
        const bool all = config.activation_dtype == ActivationDtype::int8 &&
                         config.activation_granularity == Granularity::per_tensor;
        for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), all || i / 20 == 1) << i;
      }
    }
  }
}

// int8 codes given directly, -128 included, which no scale of the contract produces. In a row of x all codes are the
// same, in a row of weights as well: every partial sum is as large as it can be at this K. Expected values need no
// other kernel: token m and row n give K * code(m) * weight(n).
void check_extreme_codes(std::int64_t tokens, std::int64_t out_features, std::int64_t in_features,
                         const BitQuantConfig& config = {}) {
  SCOPED_TRACE("tokens " + std::to_string(tokens) + " in_features " + std::to_string(in_features));
  const auto code = [](std::int64_t token) { return token % 2 == 0 ? -128 : 127; };
  const auto weight = [](std::int64_t row) { return 1 - row % 3; };  // 1 first: its code is the largest
  Codes qx, weights;
  for (std::int64_t m = 0; m < tokens; ++m) qx.insert(qx.end(), in_features, static_cast<std::int8_t>(code(m)));
  for (std::int64_t n = 0; n < out_features; ++n) {
    weights.insert(weights.end(), in_features, static_cast<std::int8_t>(weight(n)));
  }
  const Floats ones(static_cast<std::size_t>(weight_scale_size(out_features, in_features, config)), 1.0f);
  FloatVector w_scale(weight_scale_dtype(config), std::ssize(ones));
  const VectorView out = w_scale;
  convert({ones.data(), 1, out.size}, {out.data, out.dtype, 1, out.size, out.size});
  const Floats x_scale(static_cast<std::size_t>(x_scale_size(tokens, in_features, config)), 1.0f);
  Floats expected;
  for (std::int64_t m = 0; m < tokens; ++m) {
    for (std::int64_t n = 0; n < out_features; ++n) {
      expected.push_back(static_cast<float>(code(m) * weight(n) * in_features));
    }
  }
  for (const Layout layout : layouts_of(in_features)) {
    const std::vector<std::uint8_t> packed = pack_weights({weights.data(), out_features, in_features}, layout);
    const ConstMatrixView qweight(packed.data(), out_features,
                                  packed_shape(out_features, in_features, layout).row_bytes());
    for (const std::string& kernel : kernels_for(config)) {
      SCOPED_TRACE(std::string(to_string(layout)) + " " + kernel);
      Floats y(expected.size());
      bitlinear::forward_quantized({qx.data(), tokens, in_features}, x_scale, w_scale, qweight, {}, config,
                                   {y.data(), tokens, out_features}, {&serial_executor(), kernel});
      EXPECT_EQ(y, expected);
    }
  }
}

// Around the k after which int16 sums are folded (AVX2: 64 groups of four, with one token 8 steps of 16 or 21 of 20;
// NEON: 128 groups) and their multiples, with one to many tokens, whole and partial tiles.
TEST_F(Kernels, Int16SumsAtTheirBounds) {
  for (const std::int64_t tokens : {1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 24, 25, 30}) {
    for (const std::int64_t bound : {128, 240, 256, 420, 512, 1024}) {
      for (const std::int64_t k : {bound - 1, bound, bound + 1, bound + 20}) check_extreme_codes(tokens, 35, k);
    }
    check_extreme_codes(tokens, 35, 1);
    check_extreme_codes(tokens, 35, 4099);
  }
}

TEST_F(Kernels, GroupsOfExtremeCodes) {
  for (const BitQuantConfig& config : typical_configs()) {
    if (config.weight_granularity != Granularity::per_group || config.activation_dtype == ActivationDtype::float32 ||
        config.activation_granularity == Granularity::per_tensor) {
      continue;
    }
    for (const std::int64_t tokens : {1, 2, 5, 9, 13, 30}) {
      for (const std::int64_t k : {31, 256, 257, 530}) check_extreme_codes(tokens, 67, k, config);
    }
  }
}

// Around the k at which an int32 sum of a 2-bit field that is worth 64 times its value is folded (262,144) and would
// overflow (524,292).
TEST_F(Kernels, Int32SumsAtTheirBounds) {
  for (const std::int64_t in_features : {262145, 524287, 524293}) {
    for (const std::int64_t tokens : {1, 2, 4, 13}) check_extreme_codes(tokens, 2, in_features);
  }
}

// Beyond the k at which int32 sums of four-bit fields, worth 4 times their value, are folded.
TEST_F(Kernels, MostInFeatures) {
  for (const std::int64_t tokens : {1, 2}) check_extreme_codes(tokens, 1, kMaxInFeatures);
}

TEST_F(Kernels, HugeAndTinyScales) {
  for (const BitQuantConfig& config : typical_configs()) {
    Layer layer(config, 18, 50, 2);
    const Floats x = random_floats(14 * 50, 3);
    const bool groups = config.weight_granularity == Granularity::per_group;
    for (const float scale : groups ? Floats{0x1p-24f, 0x1p-14f, 65504.0f} : Floats{1e-38f, 1e-5f, 1e30f}) {
      const Floats values(static_cast<std::size_t>(layer.scale.size()), scale);
      const VectorView out = layer.scale;
      convert({values.data(), 1, out.size}, {out.data, out.dtype, 1, out.size, out.size});
      if (config.activation_dtype == ActivationDtype::int8) check_all_kernels(layer, x);
    }
  }
}

// Makes a byte of a packed weight invalid: the field at 2 bits, or the excess over the largest byte at 1.6, is `which`.
std::uint8_t invalid_byte(Layout layout, std::uint8_t valid, std::int64_t which) {
  if (layout == Layout::base3) return static_cast<std::uint8_t>(243 + which % 13);
  return static_cast<std::uint8_t>(valid | 3 << (2 * (which % 4)));
}

// In any lane of a tile, whole or partial, any step and any field. Sizes: two panels of rows for any kernel, the last
// tile has 5 rows; two blocks of k.
TEST_F(Kernels, InvalidCodesAreFound) {
  constexpr std::int64_t kRows = 69, kInFeatures = 1060;
  for (const Layout layout : kLayouts) {
    const std::int64_t steps = packed_shape(kRows, kInFeatures, layout).payload_row_bytes / 4;
    for (const ActivationDtype dtype : {ActivationDtype::int8, ActivationDtype::float32}) {
      const BitQuantConfig config{.activation_dtype = dtype};
      Layer layer = Layer(config, kRows, kInFeatures, 2).in_layout(layout);
      for (const std::int64_t tokens : {1, 3, 5, 9, 14, 25}) {
        const Floats x = random_floats(tokens * kInFeatures, 3);
        std::int64_t place = 0;  // every byte of a word in turn
        for (const std::int64_t row : {0, 3, 7, 8, 15, 16, 31, 32, 63, 64, 67, 68}) {
          for (const std::int64_t step : {std::int64_t{0}, steps / 2, steps - 1}) {
            SCOPED_TRACE(std::string(to_string(layout)) + ", " + std::to_string(tokens) + " tokens, row " +
                         std::to_string(row) + ", step " + std::to_string(step) + ", place " + std::to_string(place));
            const std::int64_t tile_rows = std::min(kTileRows, kRows - row / kTileRows * kTileRows);
            const std::int64_t word = row / kTileRows * kTileRows * steps + step * tile_rows + row % kTileRows;
            std::uint8_t& byte = layer.packed[static_cast<std::size_t>(4 * word + place % 4)];
            const std::uint8_t valid = byte;
            byte = invalid_byte(layout, valid, place / 4);
            for (const std::string& kernel : kernels_for(config)) {
              SCOPED_TRACE(kernel);
              testing::expect_error<QuantizationError>([&] { layer.forward(x, kernel, &serial_executor()); },
                                                       {"qweight", "code"});
            }
            byte = valid;
            ++place;
          }
        }
      }
    }
  }
}

// Sums are folded after at most 16,384 steps: what the first of them hold must not be forgotten.
TEST_F(Kernels, InvalidCodesAreFoundBeforeTheLastFold) {
  constexpr std::int64_t kRows = 2, kInFeatures = 350003;
  for (const Layout layout : kLayouts) {
    Layer layer = Layer({}, kRows, kInFeatures, 2).in_layout(layout);
    layer.packed[4] = invalid_byte(layout, layer.packed[4], 1);  // row 1, step 0
    for (const std::int64_t tokens : {1, 6}) {
      const Floats x = random_floats(tokens * kInFeatures, 3);
      for (const std::string& kernel : kernels_for({})) {
        SCOPED_TRACE(std::string(to_string(layout)) + ", " + std::to_string(tokens) + " tokens, " + kernel);
        testing::expect_error<QuantizationError>([&] { layer.forward(x, kernel, &serial_executor()); },
                                                 {"qweight", "code"});
      }
    }
  }
}

TEST_F(Kernels, InvalidCodesAreFoundInEveryTile) {
  constexpr std::int64_t kRows = 9 * 16 + 3, kInFeatures = 100;
  for (const Layout layout : kLayouts) {
    const Layer layer = Layer({}, kRows, kInFeatures, 2).in_layout(layout);
    const std::int64_t row_bytes = packed_shape(kRows, kInFeatures, layout).payload_row_bytes;
    for (std::int64_t row = 0; row < kRows; row += 16) {
      Layer damaged = layer;
      std::uint8_t& byte = damaged.packed[static_cast<std::size_t>(row * row_bytes)];
      byte = invalid_byte(layout, byte, 1);
      for (const std::int64_t tokens : {1, 2, 30}) {
        const Floats x = random_floats(tokens * kInFeatures, 3);
        for (const std::string& kernel : kernels_for({})) {
          SCOPED_TRACE(std::string(to_string(layout)) + ", row " + std::to_string(row) + ", " + std::to_string(tokens) +
                       " tokens, " + kernel);
          testing::expect_error<QuantizationError>([&] { damaged.forward(x, kernel, &serial_executor()); },
                                                   {"qweight", "code"});
        }
      }
    }
  }
}

TEST_F(Kernels, RowsDoNotDependOnTheirBatch) {
  for (const ActivationDtype dtype : {ActivationDtype::int8, ActivationDtype::float32}) {
    const BitQuantConfig config{Granularity::per_channel, dtype, Granularity::per_channel};
    const Layer layer(config, 50, 300, 1);
    const Floats x = random_floats(40 * 300, 2);
    for (const std::string& kernel : kernels_for(config)) {
      const Floats together = layer.forward(x, kernel);
      for (std::int64_t row = 0; row < 40; ++row) {
        const Floats alone = layer.forward({x.begin() + row * 300, x.begin() + (row + 1) * 300}, kernel);
        EXPECT_EQ(Floats(together.begin() + row * 50, together.begin() + (row + 1) * 50), alone) << kernel;
      }
    }
  }
}

// The contract's order, in plain loops: chains of 16 k, then the chains. Products are exact. No bias and a
// scale of 1, so that y is the sum itself.
Floats sums_in_chains(const Codes& weights, const Floats& x, std::int64_t out_features, std::int64_t in_features) {
  Floats sums;
  for (std::size_t first = 0; first < x.size(); first += static_cast<std::size_t>(in_features)) {
    for (std::int64_t n = 0; n < out_features; ++n) {
      float sum = 0.0f;
      for (std::int64_t begin = 0; begin < in_features; begin += 16) {
        float chain = 0.0f;
        for (std::int64_t k = begin; k < std::min(begin + 16, in_features); ++k) {
          chain += x[first + static_cast<std::size_t>(k)] * weights[static_cast<std::size_t>(n * in_features + k)];
        }
        sum += chain;
      }
      sums.push_back(sum);
    }
  }
  return sums;
}

// So their bits depend on neither rows, threads, layout nor instruction set. Sizes: around the most tokens that kernels
// multiply directly (2, 8, 11, 16) and several tiles of them; odd and even numbers of steps, some with a rest of k;
// whole and partial tiles.
TEST_F(Kernels, Float32SumsAreChainsOfSixteen) {
  const BitQuantConfig config{.activation_dtype = ActivationDtype::float32};
  ThreadPool two_threads(2);
  for (const auto& [out_features, in_features] : {std::pair{16, 16}, {37, 83}, {50, 300}, {33, 160}, {129, 1200}}) {
    const Codes weights = random_codes(out_features * in_features, 5);
    for (const std::int64_t tokens : {1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18, 33, 50}) {
      const Floats x = random_floats(tokens * in_features, 6);
      const Floats expected = sums_in_chains(weights, x, out_features, in_features);
      for (const Layout layout : layouts_of(in_features)) {
        const std::vector<std::uint8_t> packed = pack_weights({weights.data(), out_features, in_features}, layout);
        const ConstMatrixView qweight(packed.data(), out_features,
                                      packed_shape(out_features, in_features, layout).row_bytes());
        for (const std::string& kernel : kernels_for(config)) {
          SCOPED_TRACE(kernel + " " + std::string(to_string(layout)) + " tokens " + std::to_string(tokens));
          for (Executor* executor :
               {static_cast<Executor*>(&serial_executor()), static_cast<Executor*>(&two_threads)}) {
            Floats y(expected.size());
            const float one = 1.0f;
            bitlinear::forward({x.data(), tokens, in_features}, std::span(&one, 1), qweight, {}, config,
                               {y.data(), tokens, out_features}, {executor, kernel});
            EXPECT_EQ(bits_of(y), bits_of(expected));
          }
        }
      }
    }
  }
}

// The same for x, bias and y of each dtype, widened before and rounded after; random shapes, most with a rest of k.
TEST_F(Kernels, Float32KernelsAgreeToTheBit) {
  std::mt19937 engine(31);
  for (int repeat = 0; repeat < 12; ++repeat) {
    const auto pick = [&](std::int64_t most) { return static_cast<std::int64_t>(engine() % most) + 1; };
    const std::int64_t tokens = pick(30), out_features = pick(70), in_features = pick(700);
    for (const Granularity granularity : {Granularity::per_tensor, Granularity::per_channel}) {
      const Layer layer({granularity, ActivationDtype::float32}, out_features, in_features, engine());
      for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
        const auto size = static_cast<std::size_t>(tokens * in_features);
        std::vector<std::byte> x(size * size_of(dtype)), bias(layer.bias.size() * size_of(dtype));
        const auto narrow_into = [&](const Floats& from, std::vector<std::byte>& to) {
          const auto count = static_cast<std::int64_t>(from.size());
          convert({from.data(), 1, count}, {to.data(), dtype, 1, count, count});
        };
        narrow_into(random_floats(tokens * in_features, engine()), x);
        narrow_into(layer.bias, bias);
        std::vector<std::byte> expected;
        for (const Layout layout : layouts_of(in_features)) {
          const Layer packed = layer.in_layout(layout);
          for (const std::string& kernel : kernels_for(layer.config)) {
            SCOPED_TRACE(kernel + " " + std::string(to_string(layout)) + " " + std::string(to_string(dtype)) + " " +
                         std::to_string(tokens) + "x" + std::to_string(out_features) + "x" +
                         std::to_string(in_features));
            std::vector<std::byte> y(static_cast<std::size_t>(tokens * out_features) * size_of(dtype));
            bitlinear::forward({x.data(), dtype, tokens, in_features, in_features}, packed.scale, packed.qweight(),
                               {bias.data(), dtype, out_features}, packed.config,
                               {y.data(), dtype, tokens, out_features, out_features}, {&serial_executor(), kernel});
            if (expected.empty()) expected = y;
            EXPECT_EQ(y, expected);
          }
        }
      }
    }
  }
}

// The driver's rewriting of a 1.6-bit tile against digits taken one by one: any number of rows and steps, from any step
// on. An invalid byte of any place and value is found here already, not by the code 3 that it leaves.
TEST_F(Kernels, Base3TilesAreRewritten) {
  for (const std::int64_t rows : {1, 3, 8, 15, 16}) {
    for (std::int64_t steps = 1; steps <= 9; ++steps) {
      for (const std::int64_t skipped : {0, 4}) {
        SCOPED_TRACE(std::to_string(rows) + " rows, " + std::to_string(steps) + " steps after " +
                     std::to_string(skipped));
        const std::int64_t begin = skipped * rows * 4, size = steps * rows * 4;
        std::mt19937 engine(9);
        std::vector<std::uint8_t> tile(static_cast<std::size_t>(begin + size));
        for (std::uint8_t& byte : tile) byte = static_cast<std::uint8_t>(engine() % 243);
        const std::int64_t words = (steps * 20 + 15) / 16;
        std::vector<std::uint8_t> expected(static_cast<std::size_t>(words * rows * 4), 0x55);
        for (std::int64_t i = 0; i < size; ++i) {
          int rest = tile[static_cast<std::size_t>(begin + i)];
          for (std::int64_t digit = 0; digit < 5; ++digit, rest /= 3) {
            const std::int64_t group = i / (rows * 4) * 5 + digit;  // of four k
            std::uint8_t& byte = expected[static_cast<std::size_t>(group / 4 * rows * 4 + i % (rows * 4))];
            byte = static_cast<std::uint8_t>(byte + ((rest % 3 - 1) << (2 * (group % 4))));
          }
        }
        std::vector<std::uint8_t> recoded(expected.size());
        EXPECT_EQ(recode_base3(tile.data(), rows, skipped, skipped + steps, recoded.data()), 0u);
        EXPECT_EQ(recoded, expected);
        for (std::int64_t i = 0; i < size; ++i) {
          std::uint8_t& byte = tile[static_cast<std::size_t>(begin + i)];
          const std::uint8_t valid = byte;
          byte = static_cast<std::uint8_t>(243 + i % 13);
          EXPECT_NE(recode_base3(tile.data(), rows, skipped, skipped + steps, recoded.data()), 0u) << i;
          byte = valid;
        }
      }
    }
  }
}

TEST_F(Kernels, StridedAndSixteenBitTensors) {
  const BitQuantConfig config{.activation_granularity = Granularity::per_channel};
  const Layer layer(config, 21, 30, 1);
  std::vector<std::uint16_t> x(14 * 40);  // rows of 30 elements, 40 apart
  std::mt19937 engine(5);
  for (std::uint16_t& value : x) value = static_cast<std::uint16_t>(0x3c00u + engine() % 0x400u) ^ (engine() & 0x8000u);
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    std::vector<std::uint16_t> expected;
    for (const std::string& kernel : kernels_for(config)) {
      SCOPED_TRACE(kernel);
      std::vector<std::uint16_t> y(14 * 25, 0xabcd);
      bitlinear::forward({x.data(), dtype, 14, 30, 40}, layer.scale, layer.qweight(), {}, config,
                         {y.data(), dtype, 14, 21, 25}, {nullptr, kernel});
      if (expected.empty()) expected = y;
      EXPECT_EQ(y, expected);
      EXPECT_EQ(y[21], 0xabcd) << "wrote between rows";
    }
  }
}

}  // namespace
}  // namespace bitcore
