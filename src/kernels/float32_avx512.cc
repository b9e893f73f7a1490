// float32 activations with AVX-512.
//
// CPU features: AVX-512 F, BW, DQ, VL. Layout, order of the sums, bounds: float32_tiles-inl.h.
#include <immintrin.h>

#include "kernels/builtin.h"
#include "kernels/float32_tiles-inl.h"

namespace bitcore {
namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr int kLanes = 16;

  static Vector load(const float* values) { return _mm512_load_ps(values); }
  static void store(float* out, Vector values) { _mm512_store_ps(out, values); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static void multiply_add(Vector& acc, Vector a, Vector b) {
    acc = _mm512_fmadd_ps(a, b, acc);
    asm("" : "+v"(acc));  // keeps GCC 12 from copying the sums around
  }

  // The permutation looks at the low 4 bits of each lane: the code, and the next one, which the table ignores.
  template <int Shift>
  static Vector decode(const std::uint32_t* words) {
    const __m512 table = _mm512_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_load_si512(words), Shift), table);
  }
};

// 6 tokens x 4 registers of sums: 24 of 32 registers, and 4 independent sums for a single token.
// 64 rows x 64 x 4 bytes = 16 KiB: half of a common L1 cache.
using Tiles = Float32Tiles<Avx512, /*Vectors=*/4, /*Tokens=*/6, /*Block=*/64>;

}  // namespace

constinit const TileFunctions kFloat32Avx512Tiles = Tiles::table();

}  // namespace bitcore
