// float32 activations with AVX2 and FMA.
//
// CPU features: AVX2, FMA. Layout, order of the sums, bounds: float32_tiles-inl.h.
#include <immintrin.h>

#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/float32_tiles-inl.h"

namespace bitcore {
namespace {

struct Avx2 {
  using Vector = __m256;
  using Words = __m256i;
  static constexpr int kLanes = 8;

  static Vector load(const float* values) { return _mm256_load_ps(values); }
  static void store(float* out, Vector values) { _mm256_store_ps(out, values); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static void multiply_add(Vector& acc, Vector a, Vector b) {
    acc = _mm256_fmadd_ps(a, b, acc);
    asm("" : "+x"(acc));  // keeps GCC 12 from copying the sums around
  }

  static Words load_words(const std::uint8_t* bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  }
  static void store_words(std::uint32_t* out, Words words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
  }
  static Words or_adjacent(Words a, Words b) {
    return _mm256_or_si256(a, _mm256_and_si256(b, _mm256_srli_epi32(b, 1)));
  }

  // The permutation looks at the low 3 bits of each lane: the code, and a bit of the next one, which the table ignores.
  template <int Shift>
  static Vector weights(Words words) {
    const Words shifted = Shift == 0 ? words : _mm256_srli_epi32(words, Shift);
    return _mm256_permutevar8x32_ps(_mm256_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2), shifted);
  }
};

// Of 16 registers 12 hold sums, others weights, words, a table and a broadcast. With 12 tokens GCC 12 spills one.
using Direct = Float32Direct<Avx2, /*Tokens=*/11, /*Sums=*/12>;
// 3 tokens x 4 registers of sums: 12 of 16 registers.
// 32 rows x 128 x 4 bytes = 16 KiB: half of a common L1 cache.
using Panels = Float32Panels<Avx2, /*Vectors=*/4, /*Tokens=*/3, /*Block=*/128>;

}  // namespace

constinit const TileFunctions kFloat32Avx2Tiles = Panels::added_to(Direct::table());

}  // namespace bitcore
