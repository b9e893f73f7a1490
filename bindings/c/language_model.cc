// Language models through the C API: handles on the C++ objects, and one call into them each.
#include "bitmodels/language_model.h"

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bitcore/exceptions.h"
#include "bitcore/executor.h"
#include "bitlab.h"
#include "bitmodels/sampler.h"
#include "guarded.h"

struct bitlab_model {
  bitmodels::LanguageModel model;
};
struct bitlab_session {
  bitmodels::Session session;
};
struct bitlab_sampler {
  bitmodels::Sampler sampler;
};
struct bitlab_pool {
  bitcore::ThreadPool pool;
};
struct bitlab_cancellation {
  std::atomic<bool> cancelled{false};
};

namespace {

using bitcore::QuantizationError;
using bitcore::c_api::guarded;

template <class T>
T& given(T* pointer, const char* name) {
  if (pointer == nullptr) throw QuantizationError(std::string(name) + " is null");
  return *pointer;
}

// `count` elements, which may be none.
template <class T>
std::span<T> elements(T* pointer, std::int64_t count, const char* name) {
  if (count < 0) throw QuantizationError(std::string(name) + " has " + std::to_string(count) + " elements");
  if (count > 0) given(pointer, name);
  return {pointer, static_cast<std::size_t>(count)};
}

bitmodels::Logits logits_of(bitlab_logits logits) {
  switch (logits) {
    case BITLAB_LOGITS_NONE:
      return bitmodels::Logits::none;
    case BITLAB_LOGITS_LAST:
      return bitmodels::Logits::last;
    case BITLAB_LOGITS_ALL:
      return bitmodels::Logits::all;
    case BITLAB_HIDDEN:
      return bitmodels::Logits::hidden;
  }
  throw QuantizationError("logits is " + std::to_string(logits) + ", expected 0 to 3");
}

bitmodels::CacheForm cache_of(bitlab_cache cache) {
  switch (cache) {
    case BITLAB_CACHE_FLOAT16:
      return bitmodels::CacheForm::float16;
    case BITLAB_CACHE_FLOAT32:
      return bitmodels::CacheForm::float32;
    case BITLAB_CACHE_INT8:
      return bitmodels::CacheForm::int8;
  }
  throw QuantizationError("cache is " + std::to_string(cache) + ", expected 0 to 2");
}

bitmodels::SamplingParameters parameters_of(const bitlab_sampling& from) {
  bitmodels::SamplingParameters to;
  to.repetition_penalty = from.repetition_penalty;
  to.frequency_penalty = from.frequency_penalty;
  to.presence_penalty = from.presence_penalty;
  const auto tokens = elements(from.bias_tokens, from.bias_count, "bias_tokens");
  const auto biases = elements(from.biases, from.bias_count, "biases");
  for (std::size_t i = 0; i < tokens.size(); ++i) to.logit_bias.emplace_back(tokens[i], biases[i]);
  to.temperature = from.temperature;
  to.top_k = from.top_k;
  to.top_p = from.top_p;
  to.min_p = from.min_p;
  to.seed = from.seed;
  to.choice = from.choice;
  return to;
}

}  // namespace

bitlab_status bitlab_model_open(const char* directory, int32_t map, int32_t check, const char* kernel,
                                bitlab_model** model) {
  return guarded([&] {
    bitlab_model*& made = given(model, "model");
    const bitmodels::OpenOptions options{map != 0, check != 0, kernel == nullptr ? "" : kernel};
    auto opened = bitmodels::LanguageModel::open(&given(directory, "directory"), options);
    made = new bitlab_model{std::move(opened)};
  });
}

void bitlab_model_free(bitlab_model* model) { delete model; }

bitlab_status bitlab_model_describe(const bitlab_model* model, bitlab_model_info* info) {
  return guarded([&] {
    const bitmodels::LanguageModelInfo& from = given(model, "model").model.info();
    given(info, "info") = {from.vocab_size,
                           from.hidden_size,
                           from.num_layers,
                           from.num_heads,
                           from.num_key_value_heads,
                           from.head_dim,
                           from.max_position_embeddings,
                           from.weight_bytes,
                           from.architecture.c_str(),
                           from.eos_tokens.data(),
                           static_cast<std::int64_t>(from.eos_tokens.size())};
  });
}

bitlab_status bitlab_session_new(const bitlab_model* model, int64_t context_limit, bitlab_cache cache,
                                 bitlab_session** session) {
  return guarded([&] {
    bitlab_session*& made = given(session, "session");
    made = new bitlab_session{given(model, "model").model.new_session({context_limit, cache_of(cache)})};
  });
}

void bitlab_session_free(bitlab_session* session) { delete session; }

bitlab_status bitlab_session_position(const bitlab_session* session, int64_t* position) {
  return guarded([&] { given(position, "position") = given(session, "session").session.position(); });
}

bitlab_status bitlab_session_truncate(bitlab_session* session, int64_t position) {
  return guarded([&] { given(session, "session").session.truncate(position); });
}

bitlab_status bitlab_session_fork(const bitlab_session* session, bitlab_session** fork) {
  return guarded([&] {
    bitlab_session*& made = given(fork, "fork");
    made = new bitlab_session{given(session, "session").session.fork()};
  });
}

bitlab_status bitlab_forward(const bitlab_model* model, const bitlab_input* inputs, int64_t count, bitlab_pool* pool,
                             const bitlab_cancellation* cancellation) {
  bool finished = true;
  const bitlab_status status = guarded([&] {
    std::vector<bitmodels::Input> list;
    for (const bitlab_input& input : elements(inputs, count, "inputs")) {
      const auto tokens = elements(input.tokens, input.token_count, "tokens");
      const auto output = elements(input.output, input.output_floats, "output");
      list.push_back({&given(input.session, "session").session, tokens, logits_of(input.logits), output});
    }
    finished = given(model, "model")
                   .model.forward(list, {pool == nullptr ? nullptr : &pool->pool,
                                         cancellation == nullptr ? nullptr : &cancellation->cancelled});
  });
  return finished ? status : BITLAB_CANCELLED;
}

bitlab_status bitlab_sampler_new(const bitlab_sampling* sampling, int64_t vocab_size, bitlab_sampler** sampler) {
  return guarded([&] {
    if (vocab_size < 1)
      throw QuantizationError("vocab_size is " + std::to_string(vocab_size) + ", expected at least 1");
    bitlab_sampler*& made = given(sampler, "sampler");
    made = new bitlab_sampler{bitmodels::Sampler(parameters_of(given(sampling, "sampling")), vocab_size)};
  });
}

void bitlab_sampler_free(bitlab_sampler* sampler) { delete sampler; }

bitlab_status bitlab_sampler_see(bitlab_sampler* sampler, const int32_t* tokens, int64_t count) {
  return guarded([&] { given(sampler, "sampler").sampler.see(elements(tokens, count, "tokens")); });
}

bitlab_status bitlab_sampler_sample(bitlab_sampler* sampler, float* logits, int64_t vocab_size, const uint32_t* mask,
                                    int64_t mask_words, int32_t* token) {
  return guarded([&] {
    const auto allowed = elements(mask, mask_words, "mask");
    given(token, "token") = given(sampler, "sampler").sampler.sample(elements(logits, vocab_size, "logits"), allowed);
  });
}

bitlab_status bitlab_pool_new(int32_t threads, bitlab_pool** pool) {
  return guarded([&] {
    bitlab_pool*& made = given(pool, "pool");
    made = new bitlab_pool{bitcore::ThreadPool(threads)};
  });
}

void bitlab_pool_free(bitlab_pool* pool) { delete pool; }

bitlab_status bitlab_cancellation_new(bitlab_cancellation** cancellation) {
  return guarded([&] {
    bitlab_cancellation*& made = given(cancellation, "cancellation");
    made = new bitlab_cancellation;
  });
}

void bitlab_cancellation_free(bitlab_cancellation* cancellation) { delete cancellation; }

void bitlab_cancellation_set(bitlab_cancellation* cancellation, int32_t cancelled) {
  if (cancellation != nullptr) cancellation->cancelled.store(cancelled != 0, std::memory_order_relaxed);
}
