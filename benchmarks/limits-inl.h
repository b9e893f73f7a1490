// The loop of every arithmetic limit: independent multiply-adds on registers only.
//
// In an unnamed namespace: each including file is compiled for its own instruction set.
#pragma once

#include "limits.h"

namespace bitcore::benchmarks {
namespace {

/// @tparam Isa Has Vector, zero(), kMultiplyAdds (those of one call) and multiply_add(Vector& sum), which ends with an
///   empty statement that hides the sum from the compiler.
/// @tparam Sums Independent sums: as many as the kernel keeps.
template <class Isa, int Sums>
std::int64_t multiply_adds(std::int64_t rounds) {
  typename Isa::Vector sums[Sums];
#pragma GCC unroll 24
  for (int i = 0; i < Sums; ++i) sums[i] = Isa::zero();
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < Sums; ++i) Isa::multiply_add(sums[i]);
  }
  return rounds * Sums * Isa::kMultiplyAdds;
}

}  // namespace
}  // namespace bitcore::benchmarks
