#include "limits.h"

#include "cpu_features.h"

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

std::span<const ArithmeticLimit> arithmetic_limits() {
  static const ArithmeticLimit limits[] = {
#if defined(__x86_64__)
    {"Int8/Avx512Vnni/vpdpbusd-zmm", cpu_has_avx512_vnni(), avx512_vnni_multiply_adds},
    {"Int8/Avx512Vnni/vpdpbusd-ymm", cpu_has_avx512_vnni(), evex_vnni_multiply_adds},
    {"Int8/AvxVnni/vpdpbusd-ymm", cpu_has_avx_vnni(), avx_vnni_multiply_adds},
    {"Int8/Avx2/vpmaddubsw+vpaddw-ymm", cpu_has_avx2(), avx2_maddubs_multiply_adds},
    {"Int8/Sse2/pmaddwd+paddd-xmm", true, sse2_madd_multiply_adds},
    {"Float32/Avx512/vfmadd-zmm", cpu_has_avx512(), avx512_fma_multiply_adds},
    {"Float32/Avx2/vfmadd-ymm", cpu_has_avx2(), avx2_fma_multiply_adds},
    {"Float32/Sse/mulps+addps-xmm", true, sse2_float_multiply_adds},
#elif defined(__aarch64__)
    {"Int8/NeonDot/sdot", cpu_has_neon_dot(), neon_dot_multiply_adds},
    {"Int8/Neon/smlal", true, neon_smlal_multiply_adds},
    {"Float32/Neon/fmla", true, neon_fma_multiply_adds},
#endif
  };
  return limits;
}

}  // namespace bitcore::benchmarks
