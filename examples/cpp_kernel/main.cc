// Registers PlusMinusKernel and holds it against the library's own kernels, bit for bit.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "bitcore/kernels/registry.h"
#include "bitcore/ops/bitlinear.h"
#include "plus_minus_kernel.h"

using bitcore::BitQuantConfig;
using bitcore::DType;
using bitcore::Granularity;

std::vector<float> random_floats(std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

// Bits of y, of any floating dtype; every NaN counts as the same one.
std::vector<std::uint32_t> run(const std::vector<float>& x, std::int64_t tokens, const BitQuantConfig& config,
                               const bitcore::bitlinear::PreparedWeights& weights, const std::vector<float>& bias,
                               DType dtype, std::string_view kernel) {
  const std::int64_t out = weights.shape.out_features;
  std::vector<std::uint32_t> memory(static_cast<std::size_t>(tokens * out));  // enough for every dtype
  std::vector<float> y(memory.size());
  const bitcore::MatrixView result(memory.data(), dtype, tokens, out, out);
  bitcore::bitlinear::forward({x.data(), tokens, weights.shape.in_features}, weights, {bias.data(), out}, config,
                              result, {.kernel = kernel});
  bitcore::convert(result, {y.data(), tokens, out});
  std::vector<std::uint32_t> bits;
  for (const float value : y) bits.push_back(std::isnan(value) ? 0x7fc00000u : std::bit_cast<std::uint32_t>(value));
  return bits;
}

int main() {
  const auto kernel = std::make_shared<PlusMinusKernel>();
  bitcore::KernelRegistry::register_kernel(kernel);
  if (bitcore::KernelRegistry::get_kernel_for_config({})->name() != "PlusMinusKernel") return EXIT_FAILURE;

  int compared = 0, different = 0;
  for (const std::int64_t tokens : {0, 1, 5, 20}) {
    for (const std::int64_t in_features : {1, 17, 100, 257}) {
      for (const std::int64_t out_features : {1, 16, 33}) {
        for (const Granularity granularity : {Granularity::per_tensor, Granularity::per_channel}) {
          const BitQuantConfig config{.weight_granularity = granularity, .activation_granularity = granularity};
          std::vector<float> x = random_floats(tokens * in_features, 1);
          if (tokens > 1) x[0] = std::numeric_limits<float>::quiet_NaN();
          const std::vector<float> weight = random_floats(out_features * in_features, 2);
          const std::vector<float> bias = random_floats(out_features, 3);
          for (const bitcore::Layout layout : bitcore::kLayouts) {
            if (!bitcore::has_layout(in_features, layout)) continue;
            const auto weights =
                bitcore::bitlinear::prepare_weights({weight.data(), out_features, in_features}, config, layout);
            for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
              ++compared;
              different += run(x, tokens, config, weights, bias, dtype, "PlusMinusKernel") !=
                           run(x, tokens, config, weights, bias, dtype, "ReferenceKernel");
            }
          }
        }
      }
    }
  }
  std::cout << compared << " layers compared with ReferenceKernel, " << different << " differ; the kernel computed "
            << kernel->tile_calls() << " rows\n";
  bitcore::KernelRegistry::unregister_kernel("PlusMinusKernel");
  return different == 0 && kernel->tile_calls() > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
