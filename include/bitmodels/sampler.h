/// @file sampler.h
/// Chooses the next token from logits: the same token everywhere, for the same logits, parameters, seed and place.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "bitmodels/language_model.h"

namespace bitmodels {

/// How tokens are chosen. The steps follow each other in the order of these members.
struct SamplingParameters {
  float repetition_penalty = 1;  ///< Logits of tokens seen, prompt included, are divided by it (negative: multiplied).
  float frequency_penalty = 0;   ///< Subtracted once for each time that the answer has the token,
  float presence_penalty = 0;    ///< and once if it has it at all.
  std::vector<std::pair<Token, float>> logit_bias = {};  ///< Added to logits.
  float temperature = 1;     ///< Logits are divided by it; 0: the largest logit, the lowest id on ties.
  std::int64_t top_k = 0;    ///< Keep so many of the largest; 0: all.
  float top_p = 1;           ///< Keep the shortest run of the largest whose weights reach this share of their sum.
  float min_p = 0;           ///< Keep those of at least this share of the largest weight.
  std::uint32_t seed = 0;    ///< Of the random numbers.
  std::uint32_t choice = 0;  ///< Which of several answers to one prompt it is.
};

/// Chooses the tokens of one answer, one after the other.
class Sampler {
 public:
  /// @throws QuantizationError for a parameter out of its range: a repetition_penalty that is not positive, a
  ///     negative temperature or top_k, top_p outside of (0, 1], min_p outside of [0, 1], penalties that are not
  ///     finite, a bias that is NaN, a token that does not exist, a vocab_size below 1.
  Sampler(SamplingParameters parameters, std::int64_t vocab_size);

  /// Tokens that stand before the answer: repetition_penalty counts them.
  void see(std::span<const Token> tokens);

  /// Chooses the next token, and counts it as a part of the answer.
  /// @param logits (vocab_size,); they are changed.
  /// @param mask   Bit i mod 32 of word i / 32 is set if token i is allowed; empty: all are.
  /// @throws QuantizationError for a NaN among the logits, sizes that do not fit, a mask that allows nothing.
  Token sample(std::span<float> logits, std::span<const std::uint32_t> mask = {});

 private:
  void penalize(std::span<float> logits) const;
  Token greedy(std::span<const float> logits) const;
  Token draw(std::span<float> logits);
  void check_token(Token token) const;

  SamplingParameters parameters_;
  std::vector<std::int32_t> counts_;  // of the answer
  std::vector<bool> seen_;
  std::vector<float> weights_;
  std::vector<Token> order_;
  std::uint64_t index_ = 0;  // in the answer
};

/// The Philox 4x32-10 generator (Salmon et al., 2011): four words of a key and a counter.
struct Philox {
  std::uint32_t words[4];  ///< What it generates.

  /// @param key0, key1 The key. @param counter Its two low words; the others are 0.
  Philox(std::uint32_t key0, std::uint32_t key1, std::uint64_t counter);

  /// The first two words as a number in [0, 1) of 53 bits.
  double uniform() const;
};

}  // namespace bitmodels
