#include "bitlayers/rotary.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "bitlayers/elementary64.h"

namespace bitlayers {
namespace {

using Kind = RotaryScaling::Kind;

constexpr double kTwoPi = 0x1.921fb54442d18p+2;

// theta^(2i / head_dim): the reciprocals of the unscaled frequencies.
std::vector<double> powers_of_theta(std::int64_t head_dim, double theta) {
  std::vector<double> powers(static_cast<std::size_t>(head_dim / 2));
  const double log_theta = log64(theta);
  for (std::size_t i = 0; i < powers.size(); ++i) {
    powers[i] = exp64(static_cast<double>(2 * i) / static_cast<double>(head_dim) * log_theta);
  }
  return powers;
}

double llama3_frequency(double frequency, const RotaryScaling& s) {
  const double original = static_cast<double>(s.original_context);
  const double wavelength = kTwoPi / frequency;
  if (wavelength > original / s.low_freq_factor) return frequency / s.factor;
  if (wavelength < original / s.high_freq_factor) return frequency;
  const double smooth = (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1.0 - smooth) * frequency / s.factor + smooth * frequency;
}

// The pair that makes so many rotations within the original context, as a real number.
double yarn_pair(double rotations, std::int64_t head_dim, double theta, const RotaryScaling& s) {
  const double ratio = static_cast<double>(s.original_context) / (rotations * kTwoPi);
  return static_cast<double>(head_dim) * log64(ratio) / (2.0 * log64(theta));
}

// Pairs up to `low` keep their frequencies, those from `high` on are divided.
struct YarnRange {
  double low, high;

  YarnRange(std::int64_t head_dim, double theta, const RotaryScaling& s)
      : low(yarn_pair(s.beta_fast, head_dim, theta, s)), high(yarn_pair(s.beta_slow, head_dim, theta, s)) {
    if (s.truncate) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, static_cast<double>(head_dim - 1));
    if (low == high) high += 0.001;
  }

  // 0 where the frequency is kept, 1 where it is divided.
  double divided(std::size_t pair) const {
    return std::clamp((static_cast<double>(pair) - low) / (high - low), 0.0, 1.0);
  }
};

double yarn_frequency(double power, double divided, double factor) {
  const double kept = 1.0 - divided;
  return 1.0 / (factor * power) * (1.0 - kept) + 1.0 / power * kept;
}

double factor_of(const RotaryScaling& s, std::int64_t max_position_embeddings) {
  if (s.factor != 0) return s.factor;
  return static_cast<double>(max_position_embeddings) / static_cast<double>(s.original_context);
}

std::vector<double> scaled_frequencies(std::int64_t head_dim, double theta, const RotaryScaling& s, double factor,
                                       bool is_long) {
  std::vector<double> frequencies = powers_of_theta(head_dim, theta);
  const std::vector<double>& factors = is_long ? s.long_factors : s.short_factors;
  assert(s.kind != Kind::longrope || factors.size() == frequencies.size());
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double power = frequencies[i];
    switch (s.kind) {
      case Kind::none:
        frequencies[i] = 1.0 / power;
        break;
      case Kind::linear:
        frequencies[i] = 1.0 / power / factor;
        break;
      case Kind::llama3:
        frequencies[i] = llama3_frequency(1.0 / power, s);
        break;
      case Kind::yarn:
        frequencies[i] = yarn_frequency(power, YarnRange(head_dim, theta, s).divided(i), factor);
        break;
      case Kind::longrope:
        frequencies[i] = 1.0 / (factors[i] * power);
        break;
    }
  }
  return frequencies;
}

double yarn_magnitude(double factor, double mscale) { return factor <= 1.0 ? 1.0 : 0.1 * mscale * log64(factor) + 1.0; }

double attention_factor_of(const RotaryScaling& s, double factor) {
  if (s.kind != Kind::yarn && s.kind != Kind::longrope) return 1.0;
  if (s.attention_factor != 0) return s.attention_factor;
  if (s.kind == Kind::longrope) {
    const double original = static_cast<double>(s.original_context);
    return factor <= 1.0 ? 1.0 : std::sqrt(1.0 + log64(factor) / log64(original));
  }
  if (s.mscale != 0 && s.mscale_all_dim != 0) {
    return yarn_magnitude(factor, s.mscale) / yarn_magnitude(factor, s.mscale_all_dim);
  }
  return yarn_magnitude(factor, 1.0);
}

}  // namespace

Rotary::Rotary(std::int64_t head_dim, double theta, const RotaryScaling& scaling, std::int64_t context_limit,
               std::int64_t max_position_embeddings) {
  const double factor = factor_of(scaling, max_position_embeddings);
  frequencies_ = scaled_frequencies(head_dim, theta, scaling, factor, context_limit > scaling.original_context);
  attention_factor_ = attention_factor_of(scaling, factor);
}

void Rotary::cosines_and_sines(std::int64_t position, float* cosines, float* sines) const {
  for (std::size_t i = 0; i < frequencies_.size(); ++i) {
    const double angle = static_cast<double>(position) * frequencies_[i];
    cosines[i] = static_cast<float>(cos64(angle) * attention_factor_);
    sines[i] = static_cast<float>(sin64(angle) * attention_factor_);
  }
}

}  // namespace bitlayers
