// The loops of each instruction set, for limits.cc. All take the number of rounds.
#pragma once

#include <cstdint>

namespace bitcore::limits {

/// A loop without what only this CPU knows.
struct Loop {
  std::int64_t multiply_adds;  // of one round
  void (*run)(std::int64_t rounds);
};

extern const Loop kInt16Baseline;    // pmaddwd or smlal of the architecture's oldest CPU
extern const Loop kFloat32Baseline;  // a product and a sum, four lanes

#if defined(__x86_64__)
extern const Loop kMaddubsYmm;  // AVX2: vpmaddubsw and vpaddw
extern const Loop kFmaYmm;      // AVX2 and FMA
extern const Loop kFmaZmm;      // AVX-512 F
extern const Loop kDpbusdYmm;   // AVX-512 VNNI and VL
extern const Loop kDpbusdZmm;   // AVX-512 VNNI

extern const Loop kAvxVnniDpbusdYmm;  // AVX-VNNI
#elif defined(__aarch64__)
extern const Loop kSdot;      // NEON dot product
extern const Loop kSmlal;     // NEON
extern const Loop kFmlaNeon;  // NEON
#endif

}  // namespace bitcore::limits
