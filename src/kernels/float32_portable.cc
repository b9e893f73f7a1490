// float32 activations on any CPU: GCC's and Clang's vector types become SSE or NEON registers.
//
// CPU feature: none. Layout, order of the sums, bounds: float32_tiles-inl.h.
#include "kernels/builtin.h"
#include "kernels/float32_tiles-inl.h"

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

  template <int Shift>
  static Vector decode(const std::uint32_t* words) {
    const Words codes = (*reinterpret_cast<const Words*>(words) >> Shift) & 3;
    return __builtin_convertvector(codes - 1, Vector);
  }
};

// 2 tokens x 4 registers of sums, one of weights and one of activations fit the 16 registers of SSE.
// 16 rows x 256 x 4 bytes = 16 KiB: half of a common L1 cache.
using Tiles = Float32Tiles<Portable, /*Vectors=*/4, /*Tokens=*/2, /*Block=*/256>;

}  // namespace

constinit const TileFunctions kFloat32PortableTiles = Tiles::table();

}  // namespace bitcore
