// bitlayers::BitLinear: the bits of the functions that it is made of, whoever owns the memory, and what it refuses.
#include "bitlayers/bitlinear.h"

#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>

#include "../bitcore/support.h"

namespace bitlayers {
namespace {

using bitcore::BitQuantConfig;
using bitcore::ConstMatrixView;
using bitcore::ConstVectorView;
using bitcore::DType;
using bitcore::FileError;
using bitcore::Layout;
using bitcore::QuantizationError;
using bitcore::SafetensorsFile;
using bitcore::SafetensorsWriter;
using bitcore::testing::expect_error;
using bitcore::testing::Floats;
using bitcore::testing::random_floats;

constexpr std::int64_t kTokens = 5, kIn = 70, kOut = 19;

const Floats& weight() {
  static const Floats values = random_floats(kOut * kIn, 1, 0.1f);
  return values;
}
const Floats& bias() {
  static const Floats values = random_floats(kOut, 2);
  return values;
}

ConstMatrixView weight_view() { return {weight().data(), kOut, kIn}; }
ConstVectorView bias_view() { return {bias().data(), kOut}; }

Floats run(const BitLinear& layer, const bitcore::bitlinear::Options& options = {}) {
  const Floats x = random_floats(kTokens * kIn, 3);
  Floats y(kTokens * kOut);
  layer.forward({x.data(), kTokens, kIn}, {y.data(), kTokens, kOut}, options);
  return y;
}

Floats expected(const BitQuantConfig& config, ConstVectorView with_bias = bias_view()) {
  const Floats x = random_floats(kTokens * kIn, 3);
  Floats y(kTokens * kOut);
  const auto prepared = bitcore::bitlinear::prepare_weights(weight_view(), config);
  bitcore::bitlinear::forward({x.data(), kTokens, kIn}, prepared, with_bias, config, {y.data(), kTokens, kOut});
  return y;
}

std::shared_ptr<const SafetensorsFile> file_of(const SafetensorsWriter& writer, const char* name = "layers.file") {
  const auto path =
      std::filesystem::temp_directory_path() /
      (std::string("bitlayers-") + ::testing::UnitTest::GetInstance()->current_test_info()->name() + name);
  writer.save(path.string());
  auto file = std::make_shared<const SafetensorsFile>(path.string());
  std::filesystem::remove(path);  // the mapping stays
  return file;
}

BitLinear load(const std::shared_ptr<const SafetensorsFile>& file, const BitQuantConfig& config = {},
               std::int64_t out_features = kOut, std::int64_t in_features = kIn) {
  return BitLinear::load(file, LayerTensors::find(*file, "a."), out_features, in_features, config);
}

TEST(BitLinear, DeploysWithTheBitsOfTheFunctions) {
  for (const BitQuantConfig& config : bitcore::all_configs()) {
    for (const Layout layout : bitcore::kLayouts) {
      const BitLinear layer = BitLinear::deploy(weight_view(), bias_view(), config, layout);
      EXPECT_EQ(run(layer), expected(config));
      EXPECT_EQ(layer.packed_shape().layout, layout);
      EXPECT_EQ(layer.config(), config);
      EXPECT_EQ(layer.in_features(), kIn);
      EXPECT_EQ(layer.out_features(), kOut);
    }
    EXPECT_EQ(run(BitLinear::deploy(weight_view(), {}, config)), expected(config, {}));
  }
}

TEST(BitLinear, OwnsWhatItWasMadeOf) {
  Floats its_weight = weight(), its_bias = bias();
  auto prepared = bitcore::bitlinear::prepare_weights({its_weight.data(), kOut, kIn}, {});
  BitLinear layer(prepared, {its_bias.data(), kOut}, {});
  its_bias.assign(its_bias.size(), 0.0f);
  prepared = {};
  const BitLinear copy = layer;
  const BitLinear moved = std::move(layer);
  EXPECT_EQ(run(copy), expected({}));
  EXPECT_EQ(run(moved), expected({}));
  EXPECT_EQ(copy.qweight().data, moved.qweight().data);
}

TEST(BitLinear, OptionsAndWorkspace) {
  const BitLinear layer = BitLinear::deploy(weight_view(), bias_view());
  bitcore::ThreadPool threads(3);
  bitcore::bitlinear::Options options{.executor = &threads};
  std::vector<std::byte> workspace(layer.workspace_size(kTokens, options));
  options.workspace = workspace;
  EXPECT_EQ(run(layer, options), expected({}));
  options.workspace = std::span(workspace).first(1);
  expect_error<QuantizationError>([&] { run(layer, options); }, {"workspace"});
  EXPECT_EQ(run(layer, {.executor = nullptr, .kernel = "ReferenceKernel"}), expected({}));
  expect_error<bitcore::KernelNotFoundError>([&] { run(layer, {.executor = nullptr, .kernel = "None"}); }, {"None"});
}

TEST(BitLinear, ReadsWhatItWrote) {
  for (const BitQuantConfig& config : bitcore::all_configs()) {
    SafetensorsWriter writer;
    const BitLinear layer = BitLinear::deploy(weight_view(), bias_view(), config, Layout::base3);
    layer.add_to(writer, "a.");
    const auto file = file_of(writer);
    EXPECT_EQ(file->tensor("a.qweight_scale").shape.size(), static_cast<std::size_t>(config.weight_granularity));
    const BitLinear loaded = load(file, config);
    EXPECT_EQ(loaded.qweight().data, file->tensor("a.qweight").bytes.data());
    EXPECT_EQ(loaded.packed_shape().layout, Layout::base3);
    EXPECT_EQ(run(loaded), expected(config));
  }
}

TEST(BitLinear, KeepsItsFile) {
  SafetensorsWriter writer;
  const BitLinear deployed = BitLinear::deploy(weight_view());
  deployed.add_to(writer, "a.");
  auto file = file_of(writer);
  const BitLinear layer = load(file);
  file.reset();
  EXPECT_FALSE(layer.bias());
  EXPECT_EQ(run(layer), expected({}, {}));
}

TEST(BitLinear, PacksTheFloatWeightsOfAFile) {
  SafetensorsWriter writer;
  writer.add("a.weight", weight_view());
  writer.add("a.bias", bias_view());
  EXPECT_EQ(run(load(file_of(writer))), expected({}));
}

TEST(BitLinear, ViewsMemoryOfTheCaller) {
  const auto prepared = bitcore::bitlinear::prepare_weights(weight_view(), {});
  const BitLinear layer = BitLinear::view(prepared.view(), kIn, prepared.scale, bias_view(), {});
  EXPECT_EQ(layer.qweight().data, prepared.qweight.data());
  EXPECT_EQ(layer.bias().data, bias().data());
  EXPECT_EQ(run(layer), expected({}));
  auto owner = std::make_shared<int>(1);
  const BitLinear owned = BitLinear::view(prepared.view(), kIn, prepared.scale, {}, {}, owner);
  EXPECT_EQ(owner.use_count(), 2);
}

TEST(BitLinear, RefusesArgumentsThatDoNotFit) {
  auto prepared = bitcore::bitlinear::prepare_weights(weight_view(), {});
  const auto view = [&](ConstVectorView scale, ConstVectorView with_bias, std::int64_t in_features = kIn,
                        BitQuantConfig config = {}) {
    return BitLinear::view(prepared.view(), in_features, scale, with_bias, config);
  };
  const float zero = 0.0f, nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  expect_error<QuantizationError>([&] { view({&zero, 1}, {}); }, {"qweight_scale", "0", "positive"});
  expect_error<QuantizationError>([&] { view({&nan, 1}, {}); }, {"qweight_scale", "nan"});
  expect_error<QuantizationError>([&] { view({&inf, 1}, {}); }, {"qweight_scale", "inf"});
  expect_error<QuantizationError>([&] { view(bias(), {}); }, {"qweight_scale", "19", "1"});
  expect_error<QuantizationError>(
      [&] {
        view({static_cast<const float*>(nullptr), 1}, {});
      },
      {"qweight_scale is null"});
  expect_error<QuantizationError>([&] { view(prepared.scale, {bias().data(), kOut - 1}); }, {"bias", "18", "19"});
  expect_error<QuantizationError>([&] { view(prepared.scale, {nullptr, kOut}); }, {"bias is null"});
  expect_error<QuantizationError>([&] { view(prepared.scale, {bias().data(), DType::int8, kOut}); }, {"bias", "int8"});
  expect_error<QuantizationError>([&] { view(prepared.scale, {}, kIn + 1); }, {"71"});
  expect_error<QuantizationError>(
      [&] { view(prepared.scale, {}, kIn, {.weight_granularity = bitcore::Granularity::per_channel}); },
      {"qweight_scale", "1", "19"});
  Floats bad_bias = bias();
  bad_bias[7] = inf;
  expect_error<QuantizationError>(
      [&] {
        BitLinear::deploy(weight_view(), {bad_bias.data(), kOut});
      },
      {"bias holds NaN or infinity"});
  Floats bad_weight = weight();
  bad_weight[5] = nan;
  expect_error<QuantizationError>([&] { BitLinear::deploy({bad_weight.data(), kOut, kIn}); }, {"weight"});
  auto damaged = prepared;
  damaged.qweight[3] ^= 1;
  expect_error<QuantizationError>([&] { BitLinear(damaged, {}, {}); }, {"checksum"});
  damaged.qweight.pop_back();
  expect_error<QuantizationError>([&] { BitLinear(damaged, {}, {}); }, {"qweight", "elements"});
}

TEST(BitLinear, EveryByteOrOnlyTheTrailer) {
  auto prepared = bitcore::bitlinear::prepare_weights(weight_view(), {});
  prepared.qweight[3] ^= 1;
  const auto view = [&](bitcore::Verify verify) {
    return BitLinear::view(prepared.view(), kIn, prepared.scale, {}, {}, nullptr, verify);
  };
  expect_error<QuantizationError>([&] { view(bitcore::Verify::every_byte); }, {"checksum"});
  EXPECT_EQ(view(bitcore::Verify::trailer).in_features(), kIn);
  prepared.qweight[static_cast<std::size_t>(prepared.shape.payload_bytes())] ^= 1;
  expect_error<QuantizationError>([&] { view(bitcore::Verify::trailer); }, {"qweight"});
}

// Faults of a file name the file and the tensor.
TEST(BitLinear, RefusesFilesThatDoNotFit) {
  const auto prepared = bitcore::bitlinear::prepare_weights(weight_view(), {});
  const Floats scale{0.5f};
  Floats bad = bias();
  bad[1] = std::numeric_limits<float>::quiet_NaN();
  std::vector<std::uint8_t> damaged = prepared.qweight;
  damaged[0] ^= 1;
  using Fill = std::function<void(SafetensorsWriter&)>;
  const auto expect_refused = [&](const Fill& fill, const std::vector<std::string>& parts) {
    SafetensorsWriter writer;
    fill(writer);
    const auto file = file_of(writer, "refused");
    expect_error<FileError>([&] { load(file); }, parts);
  };
  const auto with_scale = [&](SafetensorsWriter& writer, const std::vector<std::uint8_t>& bytes) {
    writer.add("a.qweight", ConstMatrixView(bytes.data(), kOut, prepared.shape.row_bytes()));
    writer.add("a.qweight_scale", ConstVectorView(scale.data(), 1));
  };
  expect_refused([&](auto& w) { with_scale(w, damaged); }, {"refused", "'a.qweight'", "checksum"});
  expect_refused([&](auto& w) { w.add("a.qweight", prepared.view()); }, {"'a.qweight'", "no qweight_scale"});
  expect_refused(
      [&](auto& w) {
        w.add("a.qweight", prepared.view());
        w.add("a.qweight_scale", ConstVectorView(bad.data(), kOut));
      },
      {"'a.qweight_scale'", "19", "1"});
  expect_refused(
      [&](auto& w) {
        with_scale(w, prepared.qweight);
        w.add("a.bias", ConstVectorView(bad.data(), kOut));
      },
      {"'a.bias'", "NaN"});
  expect_refused(
      [&](auto& w) {
        with_scale(w, prepared.qweight);
        w.add("a.bias", ConstVectorView(bad.data(), 4));
      },
      {"'a.bias'", "4", "19"});
  expect_refused([&](auto& w) { w.add("a.weight", ConstMatrixView(weight().data(), kOut, kIn - 1)); },
                 {"'a.weight'", "(19, 69)", "(19, 70)"});
  expect_refused([&](auto& w) { w.add("a.weight", ConstMatrixView(damaged.data(), 2, 3)); }, {"'a.weight'"});

  SafetensorsWriter writer;
  with_scale(writer, prepared.qweight);
  const auto file = file_of(writer);
  expect_error<FileError>([&] { load(file, {}, kOut + 1); }, {"'a.qweight'", "19", "20"});
  expect_error<FileError>([&] { load(file, {}, kOut, kIn + 1); }, {"'a.qweight'", "71"});
  expect_error<QuantizationError>([&] { BitLinear::load(file, {}, kOut, kIn, {}); }, {"weight", "qweight"});
}

}  // namespace
}  // namespace bitlayers
