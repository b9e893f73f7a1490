// JSON from files, strictly: what two readers could understand differently is refused. For all C++ packages here.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace bitcore {

using Json = nlohmann::json;

/// The JSON object that `text` is, from the first brace to the last, with nothing but white space behind it.
/// @param path       Of the file, for error messages.
/// @param what       The text's name in them: "its header".
/// @param most_depth Deeper nesting is refused, so that no later code has to follow it.
/// @throws FileError if it is no such object, or an object in it has two equal keys.
Json parse_json_object(std::string_view text, const std::string& path, const std::string& what, int most_depth);

/// The integer of at least 0 that a JSON value is, however it is written: 3, 3.0 or 3e0. None for anything else, and
/// for fractions from 2^53 on, of which not every one stands for the integer that was meant.
std::optional<std::uint64_t> unsigned_integer(const Json& value);

}  // namespace bitcore
