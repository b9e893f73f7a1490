#include "bitlayers/path.h"

#include <algorithm>

#include "bitcore/base/cpu_features.h"

namespace bitlayers {

std::string_view to_string(Path path) {
  switch (path) {
    case Path::reference:
      return "reference";
    case Path::portable:
      return "portable";
    case Path::avx2:
      return "avx2";
    case Path::avx512:
      return "avx512";
    case Path::neon:
      return "neon";
  }
  return "";
}

std::vector<Path> supported_paths() {
#if defined(__x86_64__)
  std::vector<Path> paths;
  if (bitcore::cpu_has_avx512()) paths.push_back(Path::avx512);
  if (bitcore::cpu_has_avx2()) paths.push_back(Path::avx2);
  paths.push_back(Path::portable);
#elif defined(__aarch64__)
  std::vector<Path> paths{Path::neon};
#else
  std::vector<Path> paths{Path::portable};
#endif
  paths.push_back(Path::reference);
  return paths;
}

Path path_of_kernel(std::string_view kernel) {
  const auto has = [&](std::string_view part) { return kernel.find(part) != std::string_view::npos; };
  Path wanted = supported_paths().front();
  if (has("Reference")) wanted = Path::reference;
  if (has("Portable")) wanted = Path::portable;
  if (has("Avx2") || has("AvxVnni")) wanted = Path::avx2;
  const std::vector<Path> supported = supported_paths();
  const bool runs = std::find(supported.begin(), supported.end(), wanted) != supported.end();
  return runs ? wanted : supported.front();
}

}  // namespace bitlayers
