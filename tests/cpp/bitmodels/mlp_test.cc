// bitmodels::BitMLPModel: the bits of its layers, whatever it is read from and however it runs, and what it refuses.
// The Python package's models are run in tests/python/bitlab/test_demo_cpp.py.
#include "bitmodels/mlp.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <thread>

#include "../bitcore/allocations.h"
#include "../bitcore/support.h"
#include "bitcore/ops/base.h"

namespace bitmodels {
namespace {

namespace fs = std::filesystem;
using bitcore::DType;
using bitcore::FileError;
using bitcore::QuantizationError;
using bitcore::SafetensorsFile;
using bitcore::SafetensorsWriter;
using bitcore::testing::bits_of;
using bitcore::testing::expect_error;
using bitcore::testing::Floats;
using bitcore::testing::random_floats;
using bitlayers::BitLinear;

using Metadata = std::map<std::string, std::string>;

constexpr std::int64_t kWidths[] = {20, 33, 33, 5};
constexpr std::int64_t kTokens = 7;

Metadata metadata() {
  return {{"model_type", "bit_mlp"},
          {"n_layers", "3"},
          {"in_channels", "20"},
          {"hidden_dim", "33"},
          {"out_channels", "5"},
          {"dropout", "0.1"},
          {"bias", "true"},
          {"quant_config.weight_granularity", "per_channel"},
          {"quant_config.activation_dtype", "int8"},
          {"quant_config.activation_granularity", "per_channel"}};
}

constexpr const char* kConfig = R"({"model_type": "bit_mlp", "n_layers": 3, "in_channels": 20, "hidden_dim": 33,
  "out_channels": 5, "dropout": 0.1, "bias": true, "quant_config": {"weight_granularity": "per_channel"}})";

// Three layers, floating or packed.
struct Weights {
  std::vector<Floats> weights, biases;
  std::vector<BitLinear> layers;

  explicit Weights(const bitcore::BitQuantConfig& second = {.weight_granularity = bitcore::Granularity::per_channel}) {
    for (unsigned i = 0; i < 3; ++i) {
      weights.push_back(random_floats(kWidths[i] * kWidths[i + 1], i + 1, 0.3f));
      biases.push_back(random_floats(kWidths[i + 1], i + 10));
    }
    for (std::size_t i = 0; i < 3; ++i) {
      const bitcore::BitQuantConfig config{.weight_granularity = bitcore::Granularity::per_channel};
      layers.push_back(BitLinear::deploy(weight(i), bias(i), i == 1 ? second : config));
    }
  }

  bitcore::ConstMatrixView weight(std::size_t i) const { return {weights[i].data(), kWidths[i + 1], kWidths[i]}; }
  bitcore::ConstVectorView bias(std::size_t i) const { return {biases[i].data(), kWidths[i + 1]}; }

  SafetensorsWriter writer(bool deployed, const Metadata& with = metadata()) const {
    SafetensorsWriter writer;
    for (const auto& [key, value] : with) writer.set_metadata(key, value);
    for (std::size_t i = 0; i < 3; ++i) {
      const std::string prefix = "layers." + std::to_string(i) + ".";
      if (deployed) {
        layers[i].add_to(writer, prefix);
      } else {
        writer.add(prefix + "weight", weight(i));
        writer.add(prefix + "bias", bias(i));
      }
    }
    return writer;
  }

  Floats run(Floats x) const {
    for (std::size_t i = 0; i < 3; ++i) {
      Floats y(static_cast<std::size_t>(kTokens * kWidths[i + 1]));
      layers[i].forward({x.data(), kTokens, kWidths[i]}, {y.data(), kTokens, kWidths[i + 1]});
      for (float& value : y) value = i < 2 && value <= 0 ? 0.0f : value;
      x = std::move(y);
    }
    return x;
  }
};

Floats input() { return random_floats(kTokens * kWidths[0], 77); }

Floats run(const BitMLPModel& model, const Floats& x, const bitcore::bitlinear::Options& options = {}) {
  Floats y(kTokens * kWidths[3]);
  model.forward({x.data(), kTokens, kWidths[0]}, {y.data(), kTokens, kWidths[3]}, options);
  return y;
}

class BitMLP : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  BitMLPModel load(const SafetensorsWriter& writer, const std::string& config = kConfig) const {
    writer.save((folder_ / "model.safetensors").string());
    std::ofstream(folder_ / "config.json", std::ios::binary) << config;
    return BitMLPModel::from_pretrained(folder_.string());
  }
  BitMLPModel load_file(const SafetensorsWriter& writer) const {
    writer.save((folder_ / "model.safetensors").string());
    return BitMLPModel::from_pretrained((folder_ / "model.safetensors").string());
  }
  void expect_refused(const SafetensorsWriter& writer, const std::string& config,
                      const std::vector<std::string>& parts) const {
    expect_error<FileError>([&] { load(writer, config); }, parts);
  }
  // The config with one text for another.
  static std::string config_with(const std::string& text, const std::string& other) {
    std::string config = kConfig;
    EXPECT_NE(config.find(text), std::string::npos) << text;
    return config.replace(config.find(text), text.size(), other);
  }

  const Weights weights_;
  const fs::path folder_ =
      fs::temp_directory_path() /
      ("bitmodels-" + std::string(::testing::UnitTest::GetInstance()->current_test_info()->name()));
};

TEST_F(BitMLP, RunsADirectoryAFileAndBytes) {
  for (const bool deployed : {false, true}) {
    const SafetensorsWriter writer = weights_.writer(deployed);
    EXPECT_EQ(run(load(writer), input()), weights_.run(input()));
    EXPECT_EQ(run(load_file(writer), input()), weights_.run(input()));
    const std::vector<std::byte> bytes = writer.to_bytes();
    const auto model = BitMLPModel::from_file(SafetensorsFile::from_bytes(bytes, "embedded"));
    EXPECT_EQ(run(model, input()), weights_.run(input()));
    EXPECT_EQ(model.layers().size(), 3u);
    EXPECT_EQ(model.config().hidden_dim, 33);
    EXPECT_EQ(model.config().dropout, 0.1);
    EXPECT_EQ(model.config(), load(writer).config());
  }
}

TEST_F(BitMLP, OutlivesItsFile) {
  const BitMLPModel model = load(weights_.writer(true));
  fs::remove_all(folder_);
  EXPECT_EQ(run(model, input()), weights_.run(input()));
}

TEST_F(BitMLP, FilesByOtherHandsHaveNoMetadata) {
  EXPECT_EQ(run(load(weights_.writer(true, {})), input()), weights_.run(input()));
  expect_error<FileError>([&] { load_file(weights_.writer(true, {})); }, {"model.safetensors", "no saved BitMLPModel"});
}

TEST_F(BitMLP, SameBitsOnEveryPoolAndInEveryWorkspace) {
  const BitMLPModel model = load(weights_.writer(true));
  bitcore::ThreadPool threads(3);
  for (bitcore::Executor* executor : {static_cast<bitcore::Executor*>(&threads), &bitcore::serial_executor()}) {
    bitcore::bitlinear::Options options{.executor = executor};
    std::vector<std::byte> memory(model.workspace_size(kTokens, options) + 3);
    for (const std::size_t offset : {0u, 3u}) {
      options.workspace = std::span(memory).subspan(offset, memory.size() - 3);
      EXPECT_EQ(run(model, input(), options), weights_.run(input()));
    }
    options.workspace = std::span(memory).first(memory.size() - 4);
    expect_error<QuantizationError>([&] { run(model, input(), options); }, {"workspace"});
  }
  EXPECT_EQ(run(model, input(), {.executor = nullptr, .kernel = "ReferenceKernel"}), weights_.run(input()));
}

TEST_F(BitMLP, WithAWorkspaceNothingIsAllocated) {
  const BitMLPModel model = load(weights_.writer(true));
  bitcore::bitlinear::Options options{.executor = &bitcore::serial_executor()};
  std::vector<std::byte> memory(model.workspace_size(kTokens, options));
  options.workspace = memory;
  const Floats x = input();
  Floats y(kTokens * kWidths[3]);
  const std::int64_t before = bitcore::testing::allocations;
  model.forward({x.data(), kTokens, kWidths[0]}, {y.data(), kTokens, kWidths[3]}, options);
  EXPECT_EQ(bitcore::testing::allocations, before);
  EXPECT_EQ(y, weights_.run(x));
}

TEST_F(BitMLP, ManyThreadsShareAModel) {
  const BitMLPModel model = load(weights_.writer(true));
  const Floats expected = weights_.run(input());
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int call = 0; call < 20; ++call) EXPECT_EQ(run(model, input()), expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// NaN goes through ReLU, in every dtype.
TEST_F(BitMLP, RowsThatAreNotFiniteAndNarrowDtypes) {
  const BitMLPModel model = load(weights_.writer(true));
  Floats x = input();
  x[25] = std::numeric_limits<float>::quiet_NaN();
  const Floats y = run(model, x), clean = run(model, input());
  for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i / 5 == 1) << i;
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    std::vector<std::uint16_t> narrow_x(x.size()), narrow_y(y.size());
    Floats wide(y.size());
    bitcore::convert({x.data(), kTokens, 20}, {narrow_x.data(), dtype, kTokens, 20, 20});
    model.forward({narrow_x.data(), dtype, kTokens, 20, 20}, {narrow_y.data(), dtype, kTokens, 5, 5});
    bitcore::convert({narrow_y.data(), dtype, kTokens, 5, 5}, {wide.data(), kTokens, 5});
    for (std::size_t i = 0; i < wide.size(); ++i) {
      if (i / 5 == 1) {
        EXPECT_TRUE(std::isnan(wide[i])) << i;
      } else {
        EXPECT_NEAR(wide[i], clean[i], 0.1f * (1.0f + std::fabs(clean[i]))) << i;
      }
    }
  }
}

TEST_F(BitMLP, NoRowsAndOneLayer) {
  const BitMLPModel model = load(weights_.writer(true));
  model.forward({static_cast<const float*>(nullptr), 0, 20}, {static_cast<float*>(nullptr), 0, 5});
  SafetensorsWriter writer;
  weights_.layers[0].add_to(writer, "layers.0.");
  const auto one = load(writer, R"({"model_type": "bit_mlp", "n_layers": 1, "in_channels": 20, "hidden_dim": 99,
      "out_channels": 33, "quant_config": {"weight_granularity": "per_channel"}})");
  Floats y(kTokens * 33), expected(y.size());
  const Floats x = input();
  one.forward({x.data(), kTokens, 20}, {y.data(), kTokens, 33});
  weights_.layers[0].forward({x.data(), kTokens, 20}, {expected.data(), kTokens, 33});
  EXPECT_EQ(y, expected);
}

TEST_F(BitMLP, RefusesArgumentsThatDoNotFit) {
  const BitMLPModel model = load(weights_.writer(true));
  const Floats x = input();
  Floats y(kTokens * 5);
  const bitcore::MatrixView out(y.data(), kTokens, 5);
  expect_error<QuantizationError>([&] { model.forward({x.data(), kTokens, 19}, out); }, {"x", "19", "20"});
  expect_error<QuantizationError>([&] { model.forward({x.data(), kTokens, 20}, {y.data(), kTokens, 4}); }, {"y", "4"});
  expect_error<QuantizationError>([&] { model.forward({x.data(), 6, 20}, out); }, {"y", "7", "6"});
  expect_error<QuantizationError>(
      [&] {
        model.forward({x.data(), DType::int8, kTokens, 20, 20}, out);
      },
      {"x must be", "int8"});
  expect_error<QuantizationError>([&] { model.forward({x.data(), -1, 20}, out); }, {"x", "-1"});
  expect_error<QuantizationError>(
      [&] {
        model.forward({static_cast<float*>(nullptr), kTokens, 20}, out);
      },
      {"x is null"});
  expect_error<QuantizationError>([&] { model.workspace_size(-1); }, {"-1"});
}

TEST_F(BitMLP, LayersWithConfigsOfTheirOwnAndTies) {
  const Weights weights({.activation_dtype = bitcore::ActivationDtype::float32});
  Metadata with = metadata();
  with["layers.1.quant_config.weight_granularity"] = "per_tensor";
  with["layers.1.quant_config.activation_dtype"] = "float32";
  with["tied.layers.1.bias"] = "layers.0.bias";
  SafetensorsWriter writer;
  for (const auto& [key, value] : with) writer.set_metadata(key, value);
  for (std::size_t i = 0; i < 3; ++i) {
    writer.add("layers." + std::to_string(i) + ".weight", weights.weight(i));
    if (i != 1) writer.add("layers." + std::to_string(i) + ".bias", weights.bias(i));
  }
  const std::string tail =
      R"(, "module_configs": {"layers.1": {"weight_granularity": "per_tensor", "activation_dtype": "float32"}},
      "tied_tensors": {"layers.1.bias": "layers.0.bias"}})";
  const std::string config = std::string(kConfig).substr(0, std::string(kConfig).size() - 1) + tail;
  const BitMLPModel model = load(writer, config);
  EXPECT_EQ(model.layers()[1].config(), weights.layers[1].config());
  EXPECT_EQ(std::memcmp(model.layers()[1].bias().data, weights.biases[0].data(), 33 * sizeof(float)), 0);
  EXPECT_EQ(run(model, input()), run(load_file(writer), input()));
  expect_refused(writer, kConfig, {"model.safetensors", "layers.1.quant_config.activation_dtype=float32"});
  with["tied.layers.7.bias"] = "layers.0.bias";
  writer.set_metadata("tied.layers.7.bias", "layers.0.bias");
  expect_error<FileError>([&] { load_file(writer); }, {"'layers.7.bias'"});
}

TEST_F(BitMLP, NumbersAndTextAsOtherWritersWriteThem) {
  const std::string other = R"(
      {"hidden_dim": 33.0, "model_type": "BitMLPModel", "n_layers": 3e0, "in_channels": 2.0e1, "out_channels": 5,
       "dropout": 1e-1, "quant_config": {"weight_granularity": "per_channel"}})";
  EXPECT_EQ(run(load(weights_.writer(true), "\xef\xbb\xbf" + other), input()), weights_.run(input()));
  Metadata with = metadata();
  with["n_layers"] = "3.0";
  with["dropout"] = "1e-1";
  EXPECT_EQ(run(load(weights_.writer(true, with)), input()), weights_.run(input()));
  EXPECT_EQ(run(load_file(weights_.writer(true, with)), input()), weights_.run(input()));
}

TEST_F(BitMLP, RefusesConfigsThatDoNotExist) {
  const SafetensorsWriter writer = weights_.writer(true, {});
  expect_refused(writer, "", {"config.json"});
  expect_refused(writer, "[]", {"config.json", "object"});
  expect_refused(writer, "{}", {"model_type"});
  expect_refused(writer, std::string(kConfig) + "x", {"config.json", "JSON"});
  expect_refused(writer, config_with("\"bias\": true", "\"bias\": true, \"bias\": true"), {"'bias'", "twice"});
  expect_refused(writer, config_with("bit_mlp", "bit_cnn"), {"config.json", "bit_cnn", "bit_mlp"});
  expect_refused(writer, config_with("\"n_layers\": 3", "\"n_layers\": 3.5"), {"n_layers", "3.5"});
  expect_refused(writer, config_with("\"n_layers\": 3", "\"n_layers\": \"3\""), {"n_layers", "\"3\""});
  expect_refused(writer, config_with("\"n_layers\": 3", "\"n_layers\": 0"), {"n_layers", "0", "at least 1"});
  expect_refused(writer, config_with("\"n_layers\": 3", "\"n_layers\": 1e15"), {"'layers.2.bias'", "33"});
  expect_refused(writer, config_with("\"n_layers\": 3", "\"n_layers\": 2"), {"'layers.1.bias'", "33"});
  expect_refused(writer, config_with("\"n_layers\": 3", "\"layers\": 3"), {"layers", "3"});
  expect_refused(writer, config_with("\"bias\": true", "\"bias\": 1"), {"bias", "1"});
  expect_refused(writer, config_with("\"bias\": true", "\"bias\": false"), {"holds 'layers.0.bias'"});
  expect_refused(writer, config_with("0.1", "1.0"), {"dropout", "1.0"});
  expect_refused(writer, config_with("0.1", "NaN"), {"JSON"});
  expect_refused(writer, config_with("per_channel", "per_row"), {"quant_config.weight_granularity", "per_row"});
  expect_refused(writer, config_with("per_channel", "per_tensor"), {"qweight_scale"});
  expect_refused(writer, config_with("weight_granularity", "bits"), {"quant_config.bits"});
  expect_refused(writer, config_with("\"in_channels\": 20", "\"in_channels\": 21"), {"'layers.0.qweight'", "21"});
  expect_refused(writer, config_with("\"hidden_dim\": 33", "\"hidden_dim\": 9e15"), {"'layers.0.", "33"});
  expect_refused(writer,
                 config_with("0.1", "0.1, \"module_configs\": {\"layers.3\": {\"activation_dtype\": \"int8\"}}"),
                 {"layers.3.quant_config.activation_dtype"});
  expect_refused(writer, config_with("0.1", "0.1, \"module_configs\": {\"layers.1\": 3}"),
                 {"module_configs of layers.1"});
  expect_refused(writer, config_with("0.1", "0.1, \"tied_tensors\": {\"layers.1.bias\": \"none\"}"), {"'none'"});
  expect_refused(writer, config_with("0.1", "0.1, \"tied_tensors\": {\"more\": \"layers.0.bias\"}"), {"ties 'more'"});
}

TEST_F(BitMLP, RefusesFilesThatDoNotBelongTogether) {
  for (const auto& [key, value] : Metadata{{"n_layers", "4"},
                                           {"dropout", "0.2"},
                                           {"model_type", "other"},
                                           {"quant_config.activation_dtype", "float32"},
                                           {"bias", "false"}}) {
    Metadata with = metadata();
    with[key] = value;
    expect_refused(weights_.writer(true, with), kConfig,
                   {"model.safetensors: ", key + "=" + value, "config.json says"});
  }
  SafetensorsWriter more = weights_.writer(true);
  more.add("layers.3.bias", weights_.bias(0));
  expect_refused(more, kConfig, {"holds 'layers.3.bias'"});
  fs::remove(folder_ / "config.json");
  expect_error<FileError>([&] { BitMLPModel::from_pretrained(folder_.string()); }, {"config.json", "opened"});
  expect_error<FileError>([&] { BitMLPModel::from_pretrained((folder_ / "none").string()); }, {"none", "opened"});
}

TEST_F(BitMLP, RefusesMetadataThatDoNotExist) {
  for (const auto& [key, value] : Metadata{{"n_layers", "3.5"},
                                           {"hidden_dim", "-33"},
                                           {"in_channels", "inf"},
                                           {"out_channels", ""},
                                           {"bias", "True"},
                                           {"dropout", "nan"},
                                           {"quant_config.activation_dtype", "int4"},
                                           {"layers.9.quant_config.activation_dtype", "int8"},
                                           {"layers.01.quant_config.activation_dtype", "int8"},
                                           {"layers.1.quant_config.bits", "2"},
                                           {"layers.1.quant_config.activation_dtype", "int4"}}) {
    Metadata with = metadata();
    with[key] = value;
    expect_error<FileError>([&] { load_file(weights_.writer(true, with)); }, {"model.safetensors: ", key});
  }
}

}  // namespace
}  // namespace bitmodels
