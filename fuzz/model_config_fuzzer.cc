// Any config.json beside the weights of a tiny language model. The first byte names a valid config, one of each
// architecture, whose keys the rest of the input replaces (null removes one); any other byte begins a config of its
// own. Refused with the documented error, or the model is opened and computes.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "bitcore/exceptions.h"
#include "bitmodels/language_model.h"
#include "fuzz/support.h"
#include "tiny_model.h"

namespace bitcore::fuzz {
namespace {

namespace fs = std::filesystem;
using bitmodels::LanguageModel;
using bitmodels::Session;
using nlohmann::json;

void write(const fs::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
}

// The directories of one model of each architecture, and their configs.
class Models {
 public:
  Models() : folder_(fs::temp_directory_path() / ("model-config-fuzzer-" + std::to_string(getpid()))) {
    for (const auto& model : bitmodels::testing::tiny_models()) {
      directories_.push_back((folder_ / model.architecture).string());
      fs::create_directories(directories_.back());
      bitmodels::testing::write_tiny_model(directories_.back(), model);
      configs_.push_back(json::parse(bitmodels::testing::config_json(model)));
    }
  }
  ~Models() {
    std::error_code error;
    fs::remove_all(folder_, error);
  }
  // Writes the config that an input stands for. Returns the directory.
  const std::string& write_config(std::string_view input) const {
    const std::size_t index = static_cast<std::size_t>(input[0] - '0');
    const json patch = json::parse(input.substr(1), nullptr, false);
    if (index >= configs_.size() || !patch.is_object()) {
      write(fs::path(directories_[0]) / "config.json", std::string(input));
      return directories_[0];
    }
    json config = configs_[index];
    config.merge_patch(patch);
    write(fs::path(directories_[index]) / "config.json", config.dump(-1, ' ', false, json::error_handler_t::replace));
    return directories_[index];
  }

 private:
  const fs::path folder_;
  std::vector<std::string> directories_;
  std::vector<json> configs_;
};

// Tokens at the front of the context, in every form of the cache.
void use(const LanguageModel& model) {
  const bitmodels::LanguageModelInfo& info = model.info();
  require(info.vocab_size > 0 && info.num_layers > 0 && info.head_dim % 2 == 0, "a model has sizes");
  require(info.num_heads % info.num_key_value_heads == 0, "heads share keys evenly");
  using enum bitmodels::CacheForm;
  for (const auto cache : {float16, float32, int8}) {
    Session session = model.new_session({.cache = cache});
    require(session.context_limit() == info.max_position_embeddings, "a session may use the whole context");
    const bitmodels::Token tokens[] = {1, 0, static_cast<bitmodels::Token>(info.vocab_size - 1)};
    const auto count = std::min<std::int64_t>(session.context_limit(), 3);
    std::vector<float> logits(static_cast<std::size_t>(info.vocab_size), std::numeric_limits<float>::quiet_NaN());
    const bitmodels::Input input{&session, std::span(tokens).first(static_cast<std::size_t>(count)),
                                 bitmodels::Logits::last, logits};
    require(model.forward({&input, 1}, {.executor = &serial_executor()}), "nothing cancels");
    require(session.position() == count, "a session has its tokens");
  }
}

void check(std::string_view input) {
  static const Models models;
  const std::string& directory = models.write_config(input);
  throws<FileError>([&] {
    const LanguageModel model = LanguageModel::open(directory);
    use(model);
  });
}

}  // namespace
}  // namespace bitcore::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return -1;
  bitcore::fuzz::check({reinterpret_cast<const char*>(data), size});
  return 0;
}
