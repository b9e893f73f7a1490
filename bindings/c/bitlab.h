/// @file bitlab.h
/// BitLab from any language: functions of C that take the caller's memory, throw nothing and print nothing.
///
/// Every function returns a bitlab_status. Where it is not BITLAB_OK, bitlab_last_error() has one line that names the
/// argument and both values, and what was to be written is unspecified. All functions may run on any number of threads
/// at once.
#ifndef BITLAB_H
#define BITLAB_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
/// Marks what the shared object exports.
#define BITLAB_EXPORT __attribute__((visibility("default")))
#else
#define BITLAB_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/// What became of a call.
typedef int32_t bitlab_status;
enum {
  BITLAB_OK = 0,                  ///< It did what it says.
  BITLAB_QUANTIZATION_ERROR = 1,  ///< An argument has a value that does not exist or does not fit the others.
  BITLAB_OUT_OF_MEMORY = 2,       ///< There was not enough memory.
  BITLAB_INTERNAL_ERROR = 3,      ///< Anything else: a fault of BitLab.
  BITLAB_FILE_ERROR = 4,          ///< A file is missing, damaged or of another form.
  BITLAB_STATE_ERROR = 5,         ///< The object's present state does not allow the call.
  BITLAB_KERNEL_NOT_FOUND = 6,    ///< No such kernel runs here.
  BITLAB_CANCELLED = 7            ///< The call was cancelled; nothing has changed. There is no message.
};

/// Types of elements.
typedef int32_t bitlab_dtype;
enum {
  BITLAB_FLOAT32 = 0,   ///< IEEE binary32.
  BITLAB_BFLOAT16 = 1,  ///< The upper half of a binary32.
  BITLAB_FLOAT16 = 2,   ///< IEEE binary16.
  BITLAB_INT8 = 3,      ///< Signed bytes.
  BITLAB_UINT8 = 4      ///< Bytes.
};

/// How a packed weight stores its codes.
typedef int32_t bitlab_layout;
enum {
  BITLAB_2BIT = 1,  ///< Four codes in a byte.
  BITLAB_BASE3 = 2  ///< Five codes in a byte; exists where that makes a row smaller (from 65 in_features on always).
};

/// Over which weights a scale is shared.
typedef int32_t bitlab_granularity;
enum {
  BITLAB_PER_TENSOR = 0,   ///< All.
  BITLAB_PER_CHANNEL = 1,  ///< Those of an output row.
  BITLAB_PER_GROUP = 2     ///< Those of group_size adjacent in_features of a row.
};

/// A matrix to read: `rows` rows of `cols` adjacent elements, `row_stride` elements apart.
typedef struct bitlab_matrix {
  const void* data;    ///< First element of the first row.
  bitlab_dtype dtype;  ///< Of the elements.
  int64_t rows;        ///< Number of rows.
  int64_t cols;        ///< Elements in a row.
  int64_t row_stride;  ///< Elements from the start of a row to the start of the next.
} bitlab_matrix;

/// The message of this thread's last call that failed; empty before the first. Valid until the next one fails.
BITLAB_EXPORT const char* bitlab_last_error(void);

/// Bytes of a row of a packed weight, which is uint8 (out_features, row_bytes).
BITLAB_EXPORT bitlab_status bitlab_packed_row_bytes(int64_t out_features, int64_t in_features, bitlab_layout layout,
                                                    int64_t* row_bytes);

/// Packs int8 codes -1, 0 and 1 of shape (out_features, in_features).
/// @param packed       out_features * row_bytes bytes.
/// @param packed_bytes The size of `packed`.
BITLAB_EXPORT bitlab_status bitlab_pack_weights(bitlab_matrix codes, bitlab_layout layout, uint8_t* packed,
                                                size_t packed_bytes);

/// Checks every byte of a packed weight and unpacks it.
/// @param packed uint8 (out_features, row_bytes), contiguous.
/// @param codes  out_features * in_features bytes.
BITLAB_EXPORT bitlab_status bitlab_unpack_weights(bitlab_matrix packed, int64_t in_features, int8_t* codes,
                                                  size_t codes_bytes);

/// Quantizes a floating weight by the mean of its magnitudes (docs/contract.md) and packs it, on all cores.
/// @param group_size   Of BITLAB_PER_GROUP: 32, 64, 128 or 256; otherwise 128.
/// @param scale        float32: 1 or out_features elements; BITLAB_PER_GROUP: float16 (out_features,
///                     ceil(in_features / group_size)).
/// @param scale_bytes  The size of `scale`.
BITLAB_EXPORT bitlab_status bitlab_prepare_weights(bitlab_matrix weight, bitlab_granularity granularity,
                                                   int64_t group_size, bitlab_layout layout, void* scale,
                                                   size_t scale_bytes, uint8_t* packed, size_t packed_bytes);

// ---- language models ----------------------------------------------------------------------------------------------
//
// A model is opened once and shared by any number of threads. A session holds the keys and values of the tokens that it
// has seen; one thread at a time may use it, which is checked. Free sessions, samplers and pools at any time; a model
// lives until its last session is gone, whenever it is freed.

/// A language model, mapped into memory.
typedef struct bitlab_model bitlab_model;
/// Keys and values of the tokens that a model has seen.
typedef struct bitlab_session bitlab_session;
/// Chooses the tokens of one answer.
typedef struct bitlab_sampler bitlab_sampler;
/// Threads that are kept from call to call.
typedef struct bitlab_pool bitlab_pool;
/// What one thread sets to stop a call of another.
typedef struct bitlab_cancellation bitlab_cancellation;

/// How a session keeps keys and values.
typedef int32_t bitlab_cache;
enum {
  BITLAB_CACHE_FLOAT16 = 0,  ///< Rounded once.
  BITLAB_CACHE_FLOAT32 = 1,  ///< As they are.
  BITLAB_CACHE_INT8 = 2      ///< Codes, and a scale per token and head.
};

/// What the tokens of an input give.
typedef int32_t bitlab_logits;
enum {
  BITLAB_LOGITS_NONE = 0,  ///< None.
  BITLAB_LOGITS_LAST = 1,  ///< The last one.
  BITLAB_LOGITS_ALL = 2,   ///< All.
  BITLAB_HIDDEN = 3        ///< All, but not logits: the final norm, to which the head is applied.
};

/// What a model is.
typedef struct bitlab_model_info {
  int64_t vocab_size;               ///< A token is below it.
  int64_t hidden_size;              ///< Of the hidden states.
  int64_t num_layers;               ///< Decoder layers.
  int64_t num_heads;                ///< Query heads.
  int64_t num_key_value_heads;      ///< Heads of keys and values.
  int64_t head_dim;                 ///< Of every head.
  int64_t max_position_embeddings;  ///< The longest context.
  int64_t weight_bytes;             ///< That are read for a token.
  const char* architecture;         ///< The class of transformers; lives as long as the model.
  const int32_t* eos_tokens;        ///< Which end an answer; lives as long as the model.
  int64_t eos_token_count;          ///< Their number.
} bitlab_model_info;

/// Tokens that are appended to a session.
typedef struct bitlab_input {
  bitlab_session* session;  ///< No session twice in one call.
  const int32_t* tokens;    ///< At least one.
  int64_t token_count;      ///< Their number.
  bitlab_logits logits;     ///< What `output` gets.
  float* output;            ///< (rows, vocab_size), row-major; BITLAB_HIDDEN: (rows, hidden_size).
  int64_t output_floats;    ///< Of `output`.
} bitlab_input;

/// How tokens are chosen, in the order of these members.
typedef struct bitlab_sampling {
  float repetition_penalty;    ///< 1: none.
  float frequency_penalty;     ///< 0: none.
  float presence_penalty;      ///< 0: none.
  const int32_t* bias_tokens;  ///< Tokens whose logits `biases` are added to.
  const float* biases;         ///< One for each.
  int64_t bias_count;          ///< Their number.
  float temperature;           ///< 0: the largest logit.
  int64_t top_k;               ///< 0: all.
  float top_p;                 ///< 1: all.
  float min_p;                 ///< 0: all.
  uint32_t seed;               ///< Of the random numbers.
  uint32_t choice;             ///< Which of several answers it is.
} bitlab_sampling;

/// Opens the directory that `bitlab convert` or `save_pretrained` wrote.
/// @param map    1: map the weights; 0: read them into memory.
/// @param check  1: check every byte of packed weights now; 0: their trailers only.
/// @param kernel Of ternary layers, by name; null: the best.
BITLAB_EXPORT bitlab_status bitlab_model_open(const char* directory, int32_t map, int32_t check, const char* kernel,
                                              bitlab_model** model);
/// Null is allowed.
BITLAB_EXPORT void bitlab_model_free(bitlab_model* model);
/// What it is.
BITLAB_EXPORT bitlab_status bitlab_model_describe(const bitlab_model* model, bitlab_model_info* info);

/// An empty session.
/// @param context_limit Most tokens; 0: as many as the model allows.
BITLAB_EXPORT bitlab_status bitlab_session_new(const bitlab_model* model, int64_t context_limit, bitlab_cache cache,
                                               bitlab_session** session);
/// Null is allowed.
BITLAB_EXPORT void bitlab_session_free(bitlab_session* session);
/// Tokens that are in the cache.
BITLAB_EXPORT bitlab_status bitlab_session_position(const bitlab_session* session, int64_t* position);
/// Forgets all tokens from `position` on.
BITLAB_EXPORT bitlab_status bitlab_session_truncate(bitlab_session* session, int64_t position);
/// A second session with the same tokens, which shares their memory.
BITLAB_EXPORT bitlab_status bitlab_session_fork(const bitlab_session* session, bitlab_session** fork);

/// Appends tokens to sessions and computes logits, in one pass. Sessions change only if all went well.
/// @param pool         Null: the process's own.
/// @param cancellation Null: it cannot be cancelled.
BITLAB_EXPORT bitlab_status bitlab_forward(const bitlab_model* model, const bitlab_input* inputs, int64_t count,
                                           bitlab_pool* pool, const bitlab_cancellation* cancellation);

/// A sampler for one answer.
BITLAB_EXPORT bitlab_status bitlab_sampler_new(const bitlab_sampling* sampling, int64_t vocab_size,
                                               bitlab_sampler** sampler);
/// Null is allowed.
BITLAB_EXPORT void bitlab_sampler_free(bitlab_sampler* sampler);
/// Tokens that stand before the answer.
BITLAB_EXPORT bitlab_status bitlab_sampler_see(bitlab_sampler* sampler, const int32_t* tokens, int64_t count);
/// Chooses the next token. Changes the logits.
/// @param mask Bit i mod 32 of word i / 32: token i is allowed; null: all are.
BITLAB_EXPORT bitlab_status bitlab_sampler_sample(bitlab_sampler* sampler, float* logits, int64_t vocab_size,
                                                  const uint32_t* mask, int64_t mask_words, int32_t* token);

/// @param threads 0: BITLAB_NUM_THREADS, or the CPUs that this process may use.
BITLAB_EXPORT bitlab_status bitlab_pool_new(int32_t threads, bitlab_pool** pool);
/// No call may use it. Null is allowed.
BITLAB_EXPORT void bitlab_pool_free(bitlab_pool* pool);

/// Not cancelled.
BITLAB_EXPORT bitlab_status bitlab_cancellation_new(bitlab_cancellation** cancellation);
/// No call may use it. Null is allowed.
BITLAB_EXPORT void bitlab_cancellation_free(bitlab_cancellation* cancellation);
/// Cancels calls that use it, now and later (1), or no longer (0). From any thread.
BITLAB_EXPORT void bitlab_cancellation_set(bitlab_cancellation* cancellation, int32_t cancelled);

#ifdef __cplusplus
}
#endif

#endif
