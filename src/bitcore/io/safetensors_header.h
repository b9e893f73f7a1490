// The header of a safetensors file: where each tensor lies, checked as far as the header alone can be.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bitcore {

/// Before the header: its length, little-endian.
inline constexpr std::size_t kHeaderLengthBytes = 8;

/// The format's own limit on the header.
inline constexpr std::uint64_t kMostHeaderBytes = 100'000'000;

/// The key beside the tensors' names.
inline constexpr std::string_view kMetadataKey = "__metadata__";

/// One tensor: bytes [begin, end) of the data.
struct TensorPlace {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

struct SafetensorsHeader {
  std::map<std::string, TensorPlace, std::less<>> tensors;  // They fill the data without holes.
  std::map<std::string, std::string, std::less<>> metadata;
  std::uint64_t data_bytes = 0;
};

/// Bits of one element; none for a dtype that the format did not have when this was written.
std::optional<std::uint64_t> dtype_bits(std::string_view dtype);

/// Elements of a tensor; none where that many bits cannot be counted in 63 bits.
std::optional<std::uint64_t> element_count(std::span<const std::int64_t> shape);

/// The length of the header that follows the file's first bytes.
/// @throws FileError for less than eight of them, and for a length that no header has.
std::uint64_t header_length(std::span<const std::byte> first_bytes, const std::string& path);

/// @throws FileError where it is no JSON object, a tensor's entry is incomplete or contradicts itself, or tensors
/// overlap or leave holes.
SafetensorsHeader parse_header(std::string_view text, const std::string& path);

}  // namespace bitcore
