#include "bitcore/base/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bitcore {

#if defined(__aarch64__) && defined(__linux__)
bool cpu_has_neon_dot() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#else
bool cpu_has_neon_dot() { return false; }
#endif

#if defined(__x86_64__)

// GCC's and Clang's builtin reads CPUID once and checks that the operating system saves the registers.

// And F16C, which every CPU with AVX2 has, but not every virtual machine.
bool cpu_has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kF16c = 1u << 29;  // in ECX of leaf 1
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kF16c) != 0;
}

// Clang 14 does not know the name "avxvnni". AVX2's check covers the registers.
bool cpu_has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAvxVnni = 1u << 4;  // in EAX of leaf 7, subleaf 1
  return cpu_has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvxVnni) != 0;
}

bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool cpu_has_avx512_vnni() { return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool cpu_has_avx512_vbmi() { return cpu_has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }

std::vector<std::string_view> cpu_features() {
  std::vector<std::string_view> names = {"sse2"};
  if (__builtin_cpu_supports("avx2")) names.push_back("avx2");
  if (__builtin_cpu_supports("fma")) names.push_back("fma");
  if (cpu_has_avx_vnni()) names.push_back("avxvnni");
  if (__builtin_cpu_supports("avx512f")) names.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) names.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) names.push_back("avx512vl");
  if (__builtin_cpu_supports("avx512vnni")) names.push_back("avx512vnni");
  if (__builtin_cpu_supports("avx512vbmi")) names.push_back("avx512vbmi");
  return names;
}

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx_vnni() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_vnni() { return false; }
bool cpu_has_avx512_vbmi() { return false; }

std::vector<std::string_view> cpu_features() {
#if defined(__aarch64__)
  if (cpu_has_neon_dot()) return {"neon", "dotprod"};
  return {"neon"};
#else
  return {};
#endif
}

#endif

}  // namespace bitcore
