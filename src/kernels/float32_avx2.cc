// float32 activations with AVX2 and FMA.
//
// CPU features: AVX2, FMA. Layout, order of the sums, bounds: float32_tiles-inl.h.
#include <immintrin.h>

#include "kernels/builtin.h"
#include "kernels/float32_tiles-inl.h"

namespace bitcore {
namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr int kLanes = 8;

  static Vector load(const float* values) { return _mm256_load_ps(values); }
  static void store(float* out, Vector values) { _mm256_store_ps(out, values); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static void multiply_add(Vector& acc, Vector a, Vector b) {
    acc = _mm256_fmadd_ps(a, b, acc);
    asm("" : "+x"(acc));  // keeps GCC 12 from copying the sums around
  }

  // The permutation looks at the low 3 bits of each lane: the code, and a bit of the next one, which the table ignores.
  template <int Shift>
  static Vector decode(const std::uint32_t* words) {
    const __m256 table = _mm256_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2);
    const __m256i packed = _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
    return _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(packed, Shift));
  }
};

// 3 tokens x 4 registers of sums: 12 of 16 registers, and 4 independent sums for a single token.
// 32 rows x 128 x 4 bytes = 16 KiB: half of a common L1 cache.
using Tiles = Float32Tiles<Avx2, /*Vectors=*/4, /*Tokens=*/3, /*Block=*/128>;

}  // namespace

constinit const TileFunctions kFloat32Avx2Tiles = Tiles::table();

}  // namespace bitcore
