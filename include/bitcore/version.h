/// @file version.h
/// The version of BitLab: of these headers at compile time, and of the library that is linked.
#pragma once

#include <string_view>

#define BITCORE_VERSION_MAJOR 0  ///< Changes with what breaks callers.
#define BITCORE_VERSION_MINOR 1  ///< Changes with new functions; before 1.0 also with what breaks callers.
#define BITCORE_VERSION_PATCH 0  ///< Changes with corrections.

namespace bitcore {

/// The version of the library, "0.1.0".
std::string_view version();

}  // namespace bitcore
