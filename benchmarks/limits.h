// The machine's own limits, measured in the same run as the kernels that are compared with them.
#pragma once

#include <cstdint>
#include <span>

namespace bitcore::benchmarks {

/// Reads every byte once (16-byte aligned, a multiple of 128 bytes); returns something that depends on all of them.
std::uint64_t read_all(std::span<const std::uint8_t> bytes);

/// The rate of the instructions that a family of kernels multiplies with.
struct ArithmeticLimit {
  const char* name;                          ///< Data type, instruction set and instructions.
  bool supported;                            ///< Whether `run` runs on this CPU.
  std::int64_t (*run)(std::int64_t rounds);  ///< Returns multiply-adds done.
};

/// Those of the architecture that this is compiled for, fastest first.
std::span<const ArithmeticLimit> arithmetic_limits();

// Each is defined in the file that is compiled for its instruction set.
std::int64_t avx512_vnni_multiply_adds(std::int64_t rounds);   // limits_avx512vnni.cc
std::int64_t avx512_fma_multiply_adds(std::int64_t rounds);    // limits_avx512.cc
std::int64_t evex_vnni_multiply_adds(std::int64_t rounds);     // limits_avx512vnni.cc
std::int64_t avx_vnni_multiply_adds(std::int64_t rounds);      // limits_avxvnni.cc
std::int64_t avx2_maddubs_multiply_adds(std::int64_t rounds);  // limits_avx2.cc
std::int64_t avx2_fma_multiply_adds(std::int64_t rounds);      // limits_avx2.cc
std::int64_t sse2_madd_multiply_adds(std::int64_t rounds);     // limits_sse2.cc
std::int64_t sse2_float_multiply_adds(std::int64_t rounds);    // limits_sse2.cc
std::int64_t neon_dot_multiply_adds(std::int64_t rounds);      // limits_neondot.cc
std::int64_t neon_smlal_multiply_adds(std::int64_t rounds);    // limits_neon.cc
std::int64_t neon_fma_multiply_adds(std::int64_t rounds);      // limits_neon.cc

}  // namespace bitcore::benchmarks
