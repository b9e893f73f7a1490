// Whole files in memory.
#pragma once

#include <string>

#include "bitcore/io/json.h"

namespace bitmodels {

/// @throws FileError where it cannot be read.
std::string read_file(const std::string& path);

/// The JSON object in a file; see parse_json_object().
/// @throws FileError where it cannot be read or is none.
bitcore::Json read_json_file(const std::string& path, int most_depth);

}  // namespace bitmodels
