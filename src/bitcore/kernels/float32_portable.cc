// float32 activations on any CPU: GCC's and Clang's vector types become SSE or NEON registers.
//
// CPU feature: none. Layout, order of the sums, bounds: float32_tiles-inl.h.
#include "bitcore/kernels/builtin.h"
#include "bitcore/kernels/float32_tiles-inl.h"

namespace bitcore {
namespace {

struct Portable {
  typedef float Vector __attribute__((vector_size(16), may_alias));
  typedef std::int32_t Words __attribute__((vector_size(16), may_alias));
  static constexpr int kLanes = 4;

  static Vector load(const float* values) { return *reinterpret_cast<const Vector*>(values); }
  static void store(float* out, Vector values) { *reinterpret_cast<Vector*>(out) = values; }
  static Vector broadcast(float value) { return Vector{value, value, value, value}; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static void multiply_add(Vector& acc, Vector a, Vector b) { acc += a * b; }

  static Words load_words(const std::uint8_t* bytes) {
    Words words;
    std::memcpy(&words, bytes, sizeof(words));
    return words;
  }
  static void store_words(std::uint32_t* out, Words words) { std::memcpy(out, &words, sizeof(words)); }
  static Words or_adjacent(Words a, Words b) { return a | (b & (b >> 1)); }

  template <int Shift>
  static Vector weights(Words words) {
    return __builtin_convertvector(((words >> Shift) & 3) - 1, Vector);
  }
};

// Up to 2 tokens: for more, turning codes into floats takes longer than a panel's loads.
using Direct = Float32Direct<Portable, /*Tokens=*/2, /*Sums=*/8>;
// 2 tokens x 4 registers of sums, one of weights and one of activations fit the 16 registers of SSE.
// 16 rows x 256 x 4 bytes = 16 KiB: half of a common L1 cache.
using Panels = Float32Panels<Portable, /*Vectors=*/4, /*Tokens=*/2, /*Block=*/256>;

}  // namespace

constinit const TileFunctions kFloat32PortableTiles = Panels::added_to(Direct::table());

}  // namespace bitcore
