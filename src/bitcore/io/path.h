// Paths as the system takes them.
#pragma once

#include <string>

#include "bitcore/base/checks.h"

namespace bitcore {

/// The system would take what precedes a null character for the whole path.
inline void check_path(const std::string& path) {
  if (path.empty()) fail("path is empty, expected the path of a file");
  if (path.find('\0') != std::string::npos) fail("path '", path.c_str(), "' goes on after a null character");
}

}  // namespace bitcore
