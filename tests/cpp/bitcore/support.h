// What the C++ tests share: random matrices, threads, error checks.
#pragma once

#include <gtest/gtest.h>

#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/exceptions.h"
#include "bitcore/executor.h"
#include "bitcore/ops/base.h"
#include "bitcore/tensor.h"

namespace bitcore::testing {

using Floats = std::vector<float>;
using Codes = std::vector<std::int8_t>;

inline Floats random_floats(std::int64_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  Floats values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

inline Codes random_codes(std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_int_distribution<int> code(-1, 1);
  Codes values(static_cast<std::size_t>(count));
  for (std::int8_t& value : values) value = static_cast<std::int8_t>(code(engine));
  return values;
}

/// Bits of each element; every NaN counts as the same one.
inline std::vector<std::uint32_t> bits_of(const Floats& values) {
  std::vector<std::uint32_t> bits;
  for (const float value : values)
    bits.push_back(std::isnan(value) ? 0x7fc00000u : std::bit_cast<std::uint32_t>(value));
  return bits;
}

/// Runs `work(i)` on `count` threads that start together.
template <class Work>
void on_threads(int count, const Work& work) {
  std::barrier start(count);
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      start.arrive_and_wait();
      work(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

/// All configs without groups, and of those with groups one of each kind: what slow tests go through.
inline std::vector<BitQuantConfig> typical_configs() {
  using enum Granularity;
  std::vector<BitQuantConfig> configs = all_configs();
  std::erase_if(configs, [](const BitQuantConfig& config) { return config.weight_granularity == per_group; });
  configs.push_back({per_group, ActivationDtype::int8, per_group, 32});
  configs.push_back({per_group, ActivationDtype::int8, per_channel, 128});
  configs.push_back({per_group, ActivationDtype::int8, per_tensor, 64});
  configs.push_back({per_group, ActivationDtype::int8, per_group, 256});
  configs.push_back({per_group, ActivationDtype::float32, per_channel, 32});
  return configs;
}

/// The elements, widened.
inline Floats floats_of(const FloatVector& values) {
  Floats floats;
  for (std::int64_t i = 0; i < values.size(); ++i) floats.push_back(values[i]);
  return floats;
}

/// Weight scales of random finite positive values.
inline FloatVector random_scales(std::int64_t out_features, std::int64_t in_features, const BitQuantConfig& config,
                                 unsigned seed) {
  Floats values = random_floats(weight_scale_size(out_features, in_features, config), seed);
  for (float& value : values) value = std::fabs(value) + 0.01f;
  FloatVector scales(weight_scale_dtype(config), static_cast<std::int64_t>(values.size()));
  const VectorView out = scales;
  convert({values.data(), 1, out.size}, {out.data, out.dtype, 1, out.size, out.size});
  return scales;
}

/// Expects `call` to throw Error with every one of `parts` in its text.
template <class Error, class Call>
void expect_error(const Call& call, const std::vector<std::string>& parts) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown, expected an error with: " << (parts.empty() ? "" : parts.front());
  } catch (const Error& error) {
    for (const std::string& part : parts) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what() << " lacks: " << part;
    }
  }
}

}  // namespace bitcore::testing
