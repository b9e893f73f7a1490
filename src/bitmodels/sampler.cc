#include "bitmodels/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "bitcore/base/checks.h"
#include "bitlayers/layer_functions.h"
#include "bitmodels/float_environment.h"

namespace bitmodels {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

void require(bool right, const char* name, double value, const char* expected) {
  if (!right) bitcore::fail(name, " is ", value, ", expected ", expected);
}

void check(const SamplingParameters& p) {
  require(std::isfinite(p.repetition_penalty) && p.repetition_penalty > 0, "repetition_penalty", p.repetition_penalty,
          "a positive number");
  require(std::isfinite(p.frequency_penalty), "frequency_penalty", p.frequency_penalty, "a finite number");
  require(std::isfinite(p.presence_penalty), "presence_penalty", p.presence_penalty, "a finite number");
  require(std::isfinite(p.temperature) && p.temperature >= 0, "temperature", p.temperature, "a number from 0 on");
  require(p.top_k >= 0, "top_k", static_cast<double>(p.top_k), "a number from 0 on");
  require(p.top_p > 0 && p.top_p <= 1, "top_p", p.top_p, "a number above 0, up to 1");
  require(p.min_p >= 0 && p.min_p <= 1, "min_p", p.min_p, "a number from 0 to 1");
  for (const auto& [token, bias] : p.logit_bias) require(!std::isnan(bias), "logit_bias", bias, "a number");
}

void apply_mask(std::span<float> logits, std::span<const std::uint32_t> mask) {
  if (mask.empty()) return;
  const std::size_t words = (logits.size() + 31) / 32;
  if (mask.size() != words) bitcore::fail("mask has ", mask.size(), " words, expected ", words);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if ((mask[i / 32] >> (i % 32) & 1) == 0) logits[i] = kForbidden;
  }
}

}  // namespace

Sampler::Sampler(SamplingParameters parameters, std::int64_t vocab_size) : parameters_(std::move(parameters)) {
  if (vocab_size < 1) bitcore::fail("vocab_size is ", vocab_size, ", expected at least 1");
  counts_.resize(static_cast<std::size_t>(vocab_size));
  seen_.resize(static_cast<std::size_t>(vocab_size));
  check(parameters_);
  for (const auto& [token, bias] : parameters_.logit_bias) check_token(token);
}

void Sampler::check_token(Token token) const {
  if (token < 0 || static_cast<std::size_t>(token) >= counts_.size()) {
    bitcore::fail("token is ", token, ", expected 0 to ", counts_.size() - 1);
  }
}

void Sampler::see(std::span<const Token> tokens) {
  for (const Token token : tokens) {
    check_token(token);
    seen_[static_cast<std::size_t>(token)] = true;
  }
}

Token Sampler::sample(std::span<float> logits, std::span<const std::uint32_t> mask) {
  const FloatEnvironment normal;
  if (logits.size() != counts_.size()) bitcore::fail("logits has ", logits.size(), ", expected ", counts_.size());
  penalize(logits);
  for (const float logit : logits) {  // Or one that is infinite, with the opposite bias.
    if (std::isnan(logit)) bitcore::fail("logits has a NaN");
  }
  apply_mask(logits, mask);
  const Token token = parameters_.temperature == 0 ? greedy(logits) : draw(logits);
  ++counts_[static_cast<std::size_t>(token)];
  seen_[static_cast<std::size_t>(token)] = true;
  ++index_;
  return token;
}

void Sampler::penalize(std::span<float> logits) const {
  const SamplingParameters& p = parameters_;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (p.repetition_penalty != 1 && seen_[i]) {
      logits[i] = logits[i] > 0 ? logits[i] / p.repetition_penalty : logits[i] * p.repetition_penalty;
    }
    if (counts_[i] == 0) continue;
    logits[i] = logits[i] - static_cast<float>(counts_[i]) * p.frequency_penalty;
    logits[i] = logits[i] - p.presence_penalty;
  }
  for (const auto& [token, bias] : p.logit_bias) logits[static_cast<std::size_t>(token)] += bias;
}

Token Sampler::greedy(std::span<const float> logits) const {
  const auto largest = std::max_element(logits.begin(), logits.end());  // the first of equal ones
  if (*largest == kForbidden) bitcore::fail("no token is allowed by mask, logit_bias and logits");
  return static_cast<Token>(largest - logits.begin());
}

Token Sampler::draw(std::span<float> logits) {
  const SamplingParameters& p = parameters_;
  const float largest = logits[static_cast<std::size_t>(greedy(logits))];
  if (largest == std::numeric_limits<float>::infinity()) return greedy(logits);
  // The candidates, by their ids: here, and after each step that leaves some out.
  order_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = (logits[i] - largest) / p.temperature;
    if (logits[i] != kForbidden) order_.push_back(static_cast<Token>(i));
  }
  weights_.resize(logits.size());
  const auto count = static_cast<std::int64_t>(logits.size());
  bitlayers::layer_functions(bitlayers::supported_paths().front()).exp(logits.data(), count, weights_.data());
  const auto larger = [](std::span<const float> values) {
    return [values](Token a, Token b) {
      const float x = values[static_cast<std::size_t>(a)], y = values[static_cast<std::size_t>(b)];
      return x != y ? x > y : a < b;
    };
  };
  const auto sum = [&] {
    return std::accumulate(order_.begin(), order_.end(), 0.0, [&](double total, Token token) {
      return total + static_cast<double>(weights_[static_cast<std::size_t>(token)]);
    });
  };
  if (p.top_k > 0 && p.top_k < static_cast<std::int64_t>(order_.size())) {
    const auto end = order_.begin() + p.top_k;
    std::nth_element(order_.begin(), end, order_.end(), larger(logits));
    order_.erase(end, order_.end());
    std::sort(order_.begin(), order_.end());
  }
  if (p.top_p < 1) {
    const double wanted = static_cast<double>(p.top_p) * sum();
    std::sort(order_.begin(), order_.end(), larger(weights_));
    double reached = 0;
    std::size_t kept = 0;
    while (kept < order_.size() && reached < wanted) {
      reached += static_cast<double>(weights_[static_cast<std::size_t>(order_[kept++])]);
    }
    order_.resize(std::max<std::size_t>(kept, 1));
    std::sort(order_.begin(), order_.end());
  }
  std::erase_if(order_, [&](Token token) { return weights_[static_cast<std::size_t>(token)] < p.min_p; });
  const double wanted = Philox(p.seed, p.choice, index_).uniform() * sum();
  double reached = 0;
  for (const Token token : order_) {
    reached += static_cast<double>(weights_[static_cast<std::size_t>(token)]);
    if (reached > wanted) return token;
  }
  return order_.back();
}

Philox::Philox(std::uint32_t key0, std::uint32_t key1, std::uint64_t counter)
    : words{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0, 0} {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * words[0], b = std::uint64_t{0xCD9E8D57} * words[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ words[1] ^ key0, static_cast<std::uint32_t>(b),
                                   static_cast<std::uint32_t>(a >> 32) ^ words[3] ^ key1,
                                   static_cast<std::uint32_t>(a)};
    std::copy_n(next, 4, words);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

double Philox::uniform() const {
  return (static_cast<double>(words[0] >> 5) * 0x1p26 + static_cast<double>(words[1] >> 6)) * 0x1p-53;
}

}  // namespace bitmodels
