// The instruction sets that the operations of a language model are compiled for. All give the same bits.
#pragma once

#include <string_view>
#include <vector>

namespace bitlayers {

enum class Path {
  reference,  ///< Plain loops, element by element: what the others are tested against.
  portable,   ///< Any CPU.
  avx2,       ///< AVX2, FMA and F16C.
  avx512,     ///< AVX-512 F, BW, DQ and VL.
  neon,       ///< ARM64.
};

/// "reference", "portable", ...
std::string_view to_string(Path path);

/// Those that this CPU runs, best first; reference is the last.
std::vector<Path> supported_paths();

/// The one that goes with a kernel of bitcore, by its name: what "Int8Avx2Kernel" needs AVX2 has, and so on.
Path path_of_kernel(std::string_view kernel);

}  // namespace bitlayers
