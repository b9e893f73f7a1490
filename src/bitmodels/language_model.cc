#include "bitmodels/language_model.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "bitcore/base/checks.h"
#include "bitcore/kernels/registry.h"
#include "bitmodels/checkpoint.h"
#include "bitmodels/float_environment.h"
#include "bitmodels/forward.h"
#include "bitmodels/json_file.h"
#include "bitmodels/model.h"

namespace bitmodels {
namespace detail {
namespace {

using bitlayers::BitLinear;

constexpr int kConfigDepth = 8;  // quantization_config, modules, a module's fields; what transformers adds

std::vector<const BitLinear*> shapes_of(const Decoder& decoder) {
  std::vector<const BitLinear*> shapes;
  const auto add = [&](const std::optional<Linear>& linear) {
    const auto* layer = std::get_if<BitLinear>(&*linear);
    if (layer == nullptr) return;
    const auto alike = [&](const BitLinear* other) {
      return other->in_features() == layer->in_features() && other->out_features() == layer->out_features() &&
             other->packed_shape().layout == layer->packed_shape().layout && other->config() == layer->config();
    };
    if (std::none_of(shapes.begin(), shapes.end(), alike)) shapes.push_back(layer);
  };
  for (const DecoderLayer& layer : decoder.layers) {
    for (const auto* linear :
         {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down}) {
      add(*linear);
    }
  }
  return shapes;
}

// The kernel that ternary layers get, whose instruction set the other operations then use, too.
bitlayers::Path path_of(const Decoder& decoder, const std::string& kernel) {
  using bitcore::KernelRegistry;
  const bitcore::BitQuantConfig& config = decoder.config.most.quant;
  const auto chosen = kernel.empty() ? KernelRegistry::get_kernel_for_config(config)
                                     : KernelRegistry::get_kernel_by_name(kernel, config);
  return bitlayers::path_of_kernel(chosen->name());
}

LanguageModelInfo with_bytes(LanguageModelInfo info, const Decoder& decoder) {
  for (const DecoderLayer& layer : decoder.layers) {
    for (const auto* linear :
         {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down}) {
      info.weight_bytes += bytes_of(**linear);
    }
  }
  info.weight_bytes += bytes_of(decoder.head());
  return info;
}

Decoder with_info(Decoder decoder) {
  decoder.config.info = with_bytes(decoder.config.info, decoder);
  return decoder;
}

}  // namespace

Model::Model(Decoder loaded, std::string kernel_name)
    : decoder(with_info(std::move(loaded))),
      kernel(std::move(kernel_name)),
      functions(bitlayers::layer_functions(path_of(decoder, kernel))),
      attention(bitlayers::attention_functions(path_of(decoder, kernel))),
      shapes(shapes_of(decoder)) {
  if (kernel.empty()) return;
  for (const BitLinear* layer : shapes) bitcore::KernelRegistry::get_kernel_by_name(kernel, layer->config());
}

namespace {

void take(SessionState& session) {
  if (session.busy.exchange(true, std::memory_order_acquire)) {
    throw bitcore::StateError("session is in use by another thread (or twice in one call)");
  }
}

void give_back(SessionState& session) noexcept { session.busy.store(false, std::memory_order_release); }

// Takes a session for one thread, and gives it back.
class Use {
 public:
  explicit Use(SessionState& session) : session_(session) { take(session); }
  ~Use() { give_back(session_); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  SessionState& session_;
};

// The same for the sessions of a call. Room for all of them is made first: nothing fails once one is taken.
class Uses {
 public:
  Uses(std::vector<SessionState*>& sessions, std::size_t count) : sessions_(sessions) {
    sessions_.clear();
    sessions_.reserve(count);
  }
  ~Uses() {
    for (SessionState* session : sessions_) give_back(*session);
    sessions_.clear();
  }
  Uses(const Uses&) = delete;
  Uses& operator=(const Uses&) = delete;
  void add(SessionState& session) {
    take(session);
    sessions_.push_back(&session);
  }

 private:
  std::vector<SessionState*>& sessions_;
};

// A workspace of the pool, for as long as a call runs.
class Borrowed {
 public:
  explicit Borrowed(WorkspacePool& pool) : pool_(pool), workspace_(pool.take()) {}
  ~Borrowed() { pool_.give_back(std::move(workspace_)); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Workspace& operator*() { return *workspace_; }

 private:
  WorkspacePool& pool_;
  std::unique_ptr<Workspace> workspace_;
};

std::int64_t output_floats(const Input& input, const LanguageModelInfo& info) {
  const auto tokens = static_cast<std::int64_t>(input.tokens.size());
  switch (input.logits) {
    case Logits::none:
      return 0;
    case Logits::last:
      return info.vocab_size;
    case Logits::all:
      return tokens * info.vocab_size;
    case Logits::hidden:
      return tokens * info.hidden_size;
  }
  bitcore::fail("logits is ", static_cast<int>(input.logits), ", expected none, last, all or hidden");
}

void check_input(const Input& input, const SessionState& session, const LanguageModelInfo& info) {
  const auto count = static_cast<std::int64_t>(input.tokens.size());
  if (count == 0) bitcore::fail("tokens are empty, expected at least one");
  for (const Token token : input.tokens) {
    if (token < 0 || token >= info.vocab_size) {
      bitcore::fail("tokens has ", token, ", expected 0 to ", info.vocab_size - 1);
    }
  }
  if (count > session.context_limit - session.position) {
    bitcore::fail("tokens has ", count, " after ", session.position, ", and the context limit is ",
                  session.context_limit);
  }
  const std::int64_t expected = output_floats(input, info);
  if (static_cast<std::int64_t>(input.output.size()) != expected) {
    bitcore::fail("output has ", input.output.size(), " floats, expected ", expected);
  }
}

// The rows of all inputs, cut into passes.
class Passes {
 public:
  Passes(const Model& model, std::span<const Input> inputs, std::span<SessionState* const> sessions,
         const ForwardOptions& options, Workspace& workspace)
      : model_(model), inputs_(inputs), sessions_(sessions), options_(options), workspace_(workspace) {}

  bool run() {
    clear();
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      const auto count = static_cast<std::int64_t>(inputs_[i].tokens.size());
      for (std::int64_t first = 0; first < count;) {
        const std::int64_t rows = std::min(kMostRows - rows_, count - first);
        add(i, first, rows);
        first += rows;
        if (rows_ == kMostRows && !run_one()) return false;
      }
    }
    return rows_ == 0 || run_one();
  }

 private:
  void add(std::size_t index, std::int64_t first, std::int64_t rows) {
    const Input& input = inputs_[index];
    SessionState& session = *sessions_[index];
    const auto tokens = input.tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows));
    workspace_.segments.push_back({&session, tokens, session.position + first, rows_, -1});
    for (std::int64_t row = 0; row < rows; ++row) want(input, first + row, rows_ + row);
    rows_ += rows;
  }

  // What token `index` of an input gives, which is a row of the pass.
  void want(const Input& input, std::int64_t index, std::int64_t row) {
    const LanguageModelInfo& info = model_.info();
    float* const output = input.output.data();
    if (input.logits == Logits::all) workspace_.logits.push_back({row, output + index * info.vocab_size});
    if (input.logits == Logits::hidden) workspace_.hidden.push_back({row, output + index * info.hidden_size});
    const bool is_last = index + 1 == static_cast<std::int64_t>(input.tokens.size());
    if (input.logits == Logits::last && is_last) workspace_.logits.push_back({row, output});
  }

  bool run_one() {
    FloatExecutor executor(options_.executor != nullptr ? *options_.executor : bitcore::default_executor());
    const bool finished = run_pass(model_, workspace_, executor, options_.cancelled);
    clear();
    return finished;
  }

  void clear() {
    workspace_.segments.clear();
    workspace_.logits.clear();
    workspace_.hidden.clear();
    rows_ = 0;
  }

  const Model& model_;
  const std::span<const Input> inputs_;
  const std::span<SessionState* const> sessions_;
  const ForwardOptions& options_;
  Workspace& workspace_;
  std::int64_t rows_ = 0;
};

bitlayers::CacheForm form_of(CacheForm form) {
  switch (form) {
    case CacheForm::float16:
      return bitlayers::CacheForm::float16;
    case CacheForm::float32:
      return bitlayers::CacheForm::float32;
    case CacheForm::int8:
      return bitlayers::CacheForm::int8;
  }
  bitcore::fail("cache is ", static_cast<int>(form), ", expected float16, float32 or int8");
}

}  // namespace
}  // namespace detail

using detail::Model;
using detail::SessionState;

// ---- Session ------------------------------------------------------------------------------------------------------

Session::Session(std::unique_ptr<SessionState> state) : state_(std::move(state)) {}
Session::~Session() = default;
Session::Session(Session&& other) noexcept = default;
Session& Session::operator=(Session&& other) noexcept = default;

std::int64_t Session::position() const { return state_->position; }
std::int64_t Session::context_limit() const { return state_->context_limit; }

CacheForm Session::cache() const {
  switch (state_->cache.layout().form) {
    case bitlayers::CacheForm::float32:
      return CacheForm::float32;
    case bitlayers::CacheForm::int8:
      return CacheForm::int8;
    default:
      return CacheForm::float16;
  }
}

void Session::truncate(std::int64_t position) {
  const detail::Use use(*state_);
  if (position < 0 || position > state_->position) {
    bitcore::fail("position is ", position, ", expected 0 to ", state_->position);
  }
  state_->cache.truncate(position);
  state_->position = position;
}

Session Session::fork() const {
  const detail::Use use(*state_);
  auto state = std::make_unique<SessionState>(state_->model, state_->context_limit, state_->rotary, state_->cache);
  state->position = state_->position.load();
  return Session(std::move(state));
}

// ---- LanguageModel ------------------------------------------------------------------------------------------------

LanguageModel::LanguageModel(std::shared_ptr<const Model> model) : model_(std::move(model)) {}

LanguageModel LanguageModel::open(const std::string& directory, const OpenOptions& options) {
  const FloatEnvironment normal;
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) bitcore::fail_file(directory, "is no directory");
  const std::string path = (std::filesystem::path(directory) / "config.json").string();
  const DecoderConfig config = read_decoder_config(read_json_file(path, detail::kConfigDepth), path);
  Checkpoint checkpoint(directory, options.map);
  const bitcore::Verify verify = options.check ? bitcore::Verify::every_byte : bitcore::Verify::trailer;
  return LanguageModel(
      std::make_shared<const Model>(load_decoder(config, checkpoint, verify), std::string(options.kernel)));
}

const LanguageModelInfo& LanguageModel::info() const { return model_->info(); }

Session LanguageModel::new_session(const SessionOptions& options) const {
  const FloatEnvironment normal;
  const LanguageModelInfo& info = model_->info();
  const std::int64_t limit = options.context_limit == 0 ? info.max_position_embeddings : options.context_limit;
  if (limit < 1 || limit > info.max_position_embeddings) {
    bitcore::fail("context_limit is ", options.context_limit, ", expected 1 to ", info.max_position_embeddings);
  }
  const DecoderConfig& config = model_->decoder.config;
  auto rotary = std::make_shared<const bitlayers::Rotary>(info.head_dim, config.rope_theta, config.rope, limit,
                                                          info.max_position_embeddings);
  const CacheLayout layout(detail::form_of(options.cache), info.num_layers, info.num_key_value_heads, info.head_dim);
  return Session(std::make_unique<SessionState>(model_, limit, std::move(rotary), Cache(layout)));
}

bool LanguageModel::forward(std::span<const Input> inputs, const ForwardOptions& options) const {
  const FloatEnvironment normal;
  detail::Borrowed workspace(model_->workspaces);
  std::vector<SessionState*>& sessions = (*workspace).sessions;
  detail::Uses uses(sessions, inputs.size());
  for (const Input& input : inputs) {
    if (input.session == nullptr) bitcore::fail("session is null");
    SessionState& session = *input.session->state_;
    if (session.model != model_) bitcore::fail("session is of another model");
    uses.add(session);
    detail::check_input(input, session, info());
  }
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const auto count = static_cast<std::int64_t>(inputs[i].tokens.size());
    sessions[i]->cache.reserve(sessions[i]->position, sessions[i]->position + count);
  }
  if (!detail::Passes(*model_, inputs, sessions, options, *workspace).run()) return false;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    sessions[i]->position += static_cast<std::int64_t>(inputs[i].tokens.size());
  }
  return true;
}

}  // namespace bitmodels
