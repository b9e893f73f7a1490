/// @file language_model.h
/// Ternary language models: the directory that `bitlab convert` and `save_pretrained` write, run on the CPU.
///
/// The logits of a model are a pure function of its tokens and of the cache's form: the same bits for every instruction
/// set, number of threads, batch, split of the prompt, and reuse of a cache (docs/contract.md).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bitcore/executor.h"

namespace bitmodels {

/// A token's id.
using Token = std::int32_t;

/// How a session keeps keys and values.
enum class CacheForm {
  float16,  ///< Rounded once: 2 bytes. The default.
  float32,  ///< As they are: for comparison.
  int8,     ///< Codes, and a scale per token and head: 1 byte.
};

/// What a language model is, as its config.json says it.
struct LanguageModelInfo {
  std::string architecture;                  ///< The class of transformers that computes the same.
  std::int64_t vocab_size = 0;               ///< Rows of the embedding; a token is below it.
  std::int64_t hidden_size = 0;              ///< Of the hidden states.
  std::int64_t num_layers = 0;               ///< Decoder layers.
  std::int64_t num_heads = 0;                ///< Query heads.
  std::int64_t num_key_value_heads = 0;      ///< Heads of keys and values.
  std::int64_t head_dim = 0;                 ///< Of every head.
  std::int64_t max_position_embeddings = 0;  ///< The longest context.
  std::vector<Token> eos_tokens;             ///< Which end an answer; may be empty.
  std::int64_t weight_bytes = 0;             ///< Of the linear layers and the head, which are read for a token.
};

/// How a model is opened.
struct OpenOptions {
  bool map = true;               ///< Map the weights; false: read them into memory.
  bool check = false;            ///< Check every byte of packed weights now, not only their trailers.
  std::string_view kernel = {};  ///< Name of the kernel of ternary layers; empty: the registry's choice.
};

/// What a session is made with.
struct SessionOptions {
  std::int64_t context_limit = 0;        ///< Most positions; 0: the model's max_position_embeddings.
  CacheForm cache = CacheForm::float16;  ///< How keys and values are kept.
};

namespace detail {
struct Model;
struct SessionState;
}  // namespace detail

/// The keys and values of the tokens that a model has seen, and how many they are. It belongs to one model, which it
/// keeps alive. One thread at a time may use it.
class Session {
 public:
  ~Session();
  /// `other` can only be assigned to or destroyed afterwards.
  Session(Session&& other) noexcept;
  /// As the constructor.
  Session& operator=(Session&& other) noexcept;

  /// Tokens that are in the cache.
  std::int64_t position() const;
  /// Most tokens that it can hold.
  std::int64_t context_limit() const;
  /// How keys and values are kept.
  CacheForm cache() const;

  /// Forgets all tokens from `position` on.
  /// @throws QuantizationError for a position that is negative or beyond the present one.
  /// @throws StateError while a forward uses the session.
  void truncate(std::int64_t position);

  /// A second session with the same tokens. Both share the memory of what they have in common.
  /// @throws StateError while a forward uses the session.
  Session fork() const;

 private:
  friend class LanguageModel;
  explicit Session(std::unique_ptr<detail::SessionState> state);
  std::unique_ptr<detail::SessionState> state_;
};

/// What the tokens of an Input give.
enum class Logits {
  none,    ///< Nothing: they are only put into the cache.
  last,    ///< One row of logits, for the token that follows.
  all,     ///< A row of logits for each token.
  hidden,  ///< A row of hidden_size for each token: the final norm, to which the head is applied.
};

/// Tokens that are appended to a session.
struct Input {
  Session* session = nullptr;          ///< Not null; no session twice in one call.
  std::span<const Token> tokens = {};  ///< At least one.
  Logits logits = Logits::last;        ///< What `output` gets.
  std::span<float> output = {};        ///< (rows, vocab_size or hidden_size), row-major, as `logits` says.
};

/// How a forward runs, never what it computes.
struct ForwardOptions {
  bitcore::Executor* executor = nullptr;         ///< Null: default_executor().
  const std::atomic<bool>* cancelled = nullptr;  ///< Looked at between layers; null: never.
};

/// A model, mapped into memory. It cannot change: copies are cheap and share it, and any number of threads may use one.
class LanguageModel {
 public:
  /// Opens a directory with config.json and model.safetensors (or shards with their index).
  /// @throws FileError for a directory that is missing, damaged or of another form; for an architecture, a
  ///     quantization or a scaling of the rotation that is not supported (named).
  /// @throws KernelNotFoundError where no kernel of that name runs here.
  static LanguageModel open(const std::string& directory, const OpenOptions& options = {});

  /// What it is.
  const LanguageModelInfo& info() const;

  /// An empty session.
  /// @throws QuantizationError for a context_limit that is negative or above max_position_embeddings.
  Session new_session(const SessionOptions& options = {}) const;

  /// Appends tokens to sessions and computes logits; one pass for the rows of all of them. Positions change only if all
  /// went well.
  /// @return false if it was cancelled: no session has changed.
  /// @throws QuantizationError for an empty input, a token outside of the vocabulary, more tokens than the
  ///     context limit allows, an output of another size, a session of another model or twice; for damaged weights.
  /// @throws StateError for a session that another thread uses.
  bool forward(std::span<const Input> inputs, const ForwardOptions& options = {}) const;

 private:
  explicit LanguageModel(std::shared_ptr<const detail::Model> model);
  std::shared_ptr<const detail::Model> model_;
};

}  // namespace bitmodels
