#include "limits.h"

namespace bitcore::benchmarks {

std::uint64_t read_all(std::span<const std::uint8_t> bytes) {
  // Eight sums: enough independent operations to leave only the loads.
  typedef std::uint64_t Vector __attribute__((vector_size(16)));
  constexpr int kSums = 8;
  Vector sums[kSums] = {};
  const auto* vectors = reinterpret_cast<const Vector*>(bytes.data());
  for (std::size_t i = 0; (i + kSums) * sizeof(Vector) <= bytes.size(); i += kSums) {
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) sums[s] ^= vectors[i + static_cast<std::size_t>(s)];
  }
  std::uint64_t total = 0;
#pragma GCC unroll 8
  for (int s = 0; s < kSums; ++s) total ^= sums[s][0] ^ sums[s][1];
  return total;
}

#if !defined(__x86_64__)
bool has_vnni() { return false; }
std::int64_t vnni_multiply_adds(std::int64_t) { return 0; }
#endif

}  // namespace bitcore::benchmarks
