#include "limits.h"

#include <cstring>

namespace bitcore::benchmarks {

std::uint64_t read_all(std::span<const std::uint8_t> bytes) {
  // Eight vectors of sums: enough independent additions to leave only the loads.
  typedef std::uint64_t Vector __attribute__((vector_size(64)));
  Vector sums[8] = {};
  for (std::size_t i = 0; i + sizeof(sums) <= bytes.size(); i += sizeof(sums)) {
    Vector values[8];
    std::memcpy(values, bytes.data() + i, sizeof(values));
    for (int v = 0; v < 8; ++v) sums[v] ^= values[v];
  }
  std::uint64_t total = 0;
  for (const Vector& sum : sums) {
    for (int lane = 0; lane < 8; ++lane) total ^= sum[lane];
  }
  return total;
}

#if !defined(__x86_64__)
bool has_vnni() { return false; }
std::int64_t vnni_multiply_adds(std::int64_t) { return 0; }
#endif

}  // namespace bitcore::benchmarks
