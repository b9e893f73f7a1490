#include "bitmodels/mlp.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <memory>
#include <set>
#include <utility>

#include "bitcore/base/checks.h"
#include "bitmodels/relu.h"
#include "bitmodels/saved_config.h"

namespace bitmodels {
namespace {

using bitcore::ConstMatrixView;
using bitcore::fail_file;
using bitcore::MatrixView;
using bitcore::SafetensorsFile;
using bitlayers::BitLinear;
using bitlayers::LayerTensors;

// A cache line, to which scratch memory is aligned.
constexpr std::size_t kAlignment = 64;

// Builds the layers from a file, and notes which of its tensors they have taken.
class Loader {
 public:
  Loader(SafetensorsFile file, const SavedConfig& saved, bitcore::Executor& executor)
      : file_(std::make_shared<const SafetensorsFile>(std::move(file))), saved_(saved), executor_(executor) {}

  std::vector<BitLinear> load() {
    const BitMLPConfig& config = saved_.config();
    std::vector<BitLinear> layers;
    std::int64_t in_features = config.in_channels;
    for (std::int64_t i = 0; i < config.n_layers; ++i) {
      const std::int64_t out_features = i + 1 < config.n_layers ? config.hidden_dim : config.out_channels;
      layers.push_back(BitLinear::load(file_, tensors_of(i), out_features, in_features, saved_.layer_config(i),
                                       bitcore::Verify::every_byte, executor_));
      in_features = out_features;
    }
    check_all_taken();
    return layers;
  }

 private:
  LayerTensors tensors_of(std::int64_t index) {
    const std::string prefix = "layers." + std::to_string(index) + ".";
    LayerTensors tensors;
    if (file_->contains(saved_.stored_name(prefix + "qweight"))) {
      tensors.qweight = take(prefix + "qweight");
      tensors.qweight_scale = take(prefix + "qweight_scale");
    } else {
      tensors.weight = take(prefix + "weight");
    }
    if (saved_.config().bias) tensors.bias = take(prefix + "bias");
    return tensors;
  }

  const bitcore::TensorEntry* take(const std::string& name) {
    const std::string& stored = saved_.stored_name(name);
    taken_.insert({name, stored});
    return &file_->tensor(stored);
  }

  void check_all_taken() const {
    for (const auto& [name, entry] : file_->tensors()) check_taken(name, "holds");
    for (const std::string& name : saved_.tied_names()) check_taken(name, "ties");
  }
  void check_taken(const std::string& name, const char* what) const {
    if (!taken_.contains(name)) fail_file(file_->path(), what, " '", name, "', which the model does not have");
  }

  const std::shared_ptr<const SafetensorsFile> file_;
  const SavedConfig& saved_;
  bitcore::Executor& executor_;
  std::set<std::string, std::less<>> taken_;
};

// Where forward() keeps hidden activations, two matrices in turn, and its layers their scratch memory.
struct Scratch {
  std::span<std::byte> hidden[2];
  std::span<std::byte> layers;
};

Scratch split(std::span<std::byte> memory, std::size_t hidden_bytes) {
  const std::size_t begin = -reinterpret_cast<std::uintptr_t>(memory.data()) % kAlignment;
  return {{memory.subspan(begin, hidden_bytes), memory.subspan(begin + hidden_bytes, hidden_bytes)},
          memory.subspan(begin + 2 * hidden_bytes)};
}

}  // namespace

BitMLPModel::BitMLPModel(const BitMLPConfig& config, std::vector<BitLinear> layers)
    : config_(config), layers_(std::move(layers)) {}

BitMLPModel BitMLPModel::from_pretrained(const std::string& path, bitcore::Executor& executor) {
  const std::filesystem::path directory(path);
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) return from_file(SafetensorsFile(path), executor);
  const std::string config_path = (directory / "config.json").string();
  const Fields fields = read_config_json(config_path);
  const SavedConfig saved(fields, config_path);
  SafetensorsFile file((directory / "model.safetensors").string());
  check_metadata(file.metadata(), file.path(), fields, config_path);
  return {saved.config(), Loader(std::move(file), saved, executor).load()};
}

BitMLPModel BitMLPModel::from_file(SafetensorsFile file, bitcore::Executor& executor) {
  const SavedConfig saved(file.metadata(), file.path());
  return {saved.config(), Loader(std::move(file), saved, executor).load()};
}

void BitMLPModel::forward(ConstMatrixView x, MatrixView y, const bitcore::bitlinear::Options& options) const {
  bitcore::check_view(x, "x");
  bitcore::check_view(y, "y");
  bitcore::check_floating(x.dtype, "x");
  bitcore::check_shape(x.rows, x.cols, x.rows, config_.in_channels, "x");
  bitcore::check_shape(y.rows, y.cols, x.rows, config_.out_channels, "y");
  const std::size_t hidden_bytes = this->hidden_bytes(x.rows);
  std::vector<std::byte> own;
  std::span<std::byte> memory = options.workspace;
  if (memory.empty()) {
    own.resize(kAlignment + 2 * hidden_bytes);
    memory = own;
  } else if (const std::size_t needed = workspace_size(x.rows, options); memory.size() < needed) {
    bitcore::fail("workspace has ", memory.size(), " bytes, expected at least ", needed);
  }
  const Scratch scratch = split(memory, hidden_bytes);
  bitcore::bitlinear::Options layer_options = options;
  layer_options.workspace = own.empty() ? scratch.layers : std::span<std::byte>();

  for (std::size_t i = 0; i + 1 < layers_.size(); ++i) {
    const MatrixView hidden(scratch.hidden[i % 2].data(), x.dtype, x.rows, config_.hidden_dim, config_.hidden_dim);
    layers_[i].forward(x, hidden, layer_options);
    relu(hidden);
    x = hidden;
  }
  layers_.back().forward(x, y, layer_options);
}

std::size_t BitMLPModel::workspace_size(std::int64_t rows, const bitcore::bitlinear::Options& options) const {
  std::size_t layer_bytes = 0;
  for (const BitLinear& layer : layers_) layer_bytes = std::max(layer_bytes, layer.workspace_size(rows, options));
  return kAlignment + 2 * hidden_bytes(rows) + layer_bytes;
}

// Of one matrix, in the widest dtype.
std::size_t BitMLPModel::hidden_bytes(std::int64_t rows) const {
  if (layers_.size() == 1) return 0;
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / 64;
  if (rows < 0 || rows > kMost / config_.hidden_dim) {
    bitcore::fail("x has ", rows, " rows, expected 0 to ", kMost / config_.hidden_dim);
  }
  const std::size_t bytes = static_cast<std::size_t>(rows * config_.hidden_dim) * sizeof(float);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace bitmodels
