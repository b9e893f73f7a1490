// What this CPU and its operating system can run.
#pragma once

#include <string_view>
#include <vector>

namespace bitcore {

/// Names of the features that decide between the built-in kernels. Users find it in bitcore/kernels/registry.h.
std::vector<std::string_view> cpu_features();

// x86-64: and the operating system saves the registers.

/// AVX2 and FMA.
bool cpu_has_avx2();

/// The same and VNNI with 256-bit registers in AVX's encoding.
bool cpu_has_avx_vnni();

/// AVX-512 F, BW, DQ and VL.
bool cpu_has_avx512();

/// The same and VNNI.
bool cpu_has_avx512_vnni();

/// The same and VBMI.
bool cpu_has_avx512_vbmi();

/// ARM64's dot product instructions (ARMv8.2).
bool cpu_has_neon_dot();

}  // namespace bitcore
