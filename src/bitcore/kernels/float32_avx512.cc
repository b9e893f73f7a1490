// float32 activations with AVX-512.
//
// CPU features: AVX-512 F, BW, DQ, VL. Layout, order of the sums, bounds: float32_tiles-inl.h.
#include <immintrin.h>

#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/float32_tiles-inl.h"

namespace bitcore {
namespace {

struct Avx512 {
  using Vector = __m512;
  using Words = __m512i;
  static constexpr int kLanes = 16;

  static Vector load(const float* values) { return _mm512_load_ps(values); }
  static void store(float* out, Vector values) { _mm512_store_ps(out, values); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static void multiply_add(Vector& acc, Vector a, Vector b) {
    acc = _mm512_fmadd_ps(a, b, acc);
    asm("" : "+v"(acc));  // keeps GCC 12 from copying the sums around
  }

  static Words load_words(const std::uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static void store_words(std::uint32_t* out, Words words) { _mm512_storeu_si512(out, words); }
  static Words or_adjacent(Words a, Words b) {
    return _mm512_or_si512(a, _mm512_and_si512(b, _mm512_srli_epi32(b, 1)));
  }

  // A permutation looks at the low 4 bits of each lane, where one table finds the lower code and another the upper one:
  // one shift serves two fields.
  template <int Shift>
  static Vector weights(Words words) {
    const Words shifted = Shift < 4 ? words : _mm512_srli_epi32(words, Shift / 4 * 4);
    const __m512 lower = _mm512_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2);
    const __m512 upper = _mm512_setr_ps(-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2);
    return _mm512_permutexvar_ps(shifted, Shift % 4 == 0 ? lower : upper);
  }
};

// 16 sums, 4 shifted words, 2 tables: 22 of 32 registers. With so many tokens a multiply-add starts in 96 of 100
// cycles.

}  // namespace

constinit const TileFunctions kFloat32Avx512Tiles = Float32Direct<Avx512, /*Tokens=*/16, /*Sums=*/16>::table();

}  // namespace bitcore
