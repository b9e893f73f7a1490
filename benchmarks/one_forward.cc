// One call of bitlinear::forward with a kernel: what count_arm64_instructions.py counts.
//
//   one_forward <kernel> <rows of x> <out_features> <in_features>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "bitcore/executor.h"
#include "bitcore/ops/bitlinear.h"

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: one_forward <kernel> <rows of x> <out_features> <in_features>\n";
    return 2;
  }
  const std::string kernel = argv[1];
  const std::int64_t tokens = std::atoll(argv[2]), out_features = std::atoll(argv[3]),
                     in_features = std::atoll(argv[4]);
  const bitcore::BitQuantConfig config{.activation_dtype = kernel.starts_with("Float32")
                                                               ? bitcore::ActivationDtype::float32
                                                               : bitcore::ActivationDtype::int8,
                                       .activation_granularity = bitcore::Granularity::per_channel};
  const std::vector<float> weight(static_cast<std::size_t>(out_features * in_features), 1.0f);
  const std::vector<float> x(static_cast<std::size_t>(tokens * in_features), 1.0f);
  std::vector<float> y(static_cast<std::size_t>(tokens * out_features));
  const auto prepared = bitcore::bitlinear::prepare_weights({weight.data(), out_features, in_features}, config);
  bitcore::bitlinear::forward({x.data(), tokens, in_features}, prepared, {}, config, {y.data(), tokens, out_features},
                              {&bitcore::serial_executor(), kernel});
}
