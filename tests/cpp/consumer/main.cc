// Trains nothing, packs a weight, runs it on every kernel of this machine: the same bits, or a non-zero exit code.
#include <iostream>
#include <vector>

#include "bitcore/kernels/registry.h"
#include "bitcore/ops/bitlinear.h"

int main() {
  constexpr std::int64_t tokens = 20, in_features = 100, out_features = 40;
  std::vector<float> x(tokens * in_features), weight(out_features * in_features);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) - 8.0f;
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(i % 5) - 2.0f;

  const bitcore::BitQuantConfig config;
  const auto prepared = bitcore::bitlinear::prepare_weights({weight.data(), out_features, in_features}, config);
  std::vector<float> expected;
  for (const auto& kernel : bitcore::KernelRegistry::all_kernels()) {
    if (!kernel->is_supported() || !kernel->is_compatible_with(config)) continue;
    std::vector<float> y(tokens * out_features);
    bitcore::bitlinear::forward({x.data(), tokens, in_features}, prepared, {}, config, {y.data(), tokens, out_features},
                                {.executor = nullptr, .kernel = kernel->name()});
    if (expected.empty()) expected = y;
    std::cout << kernel->name() << (y == expected ? "" : " differs") << "\n";
    if (y != expected) return 1;
  }
  return expected.empty() ? 1 : 0;
}
