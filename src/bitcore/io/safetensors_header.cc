#include "bitcore/io/safetensors_header.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "bitcore/base/checks.h"
#include "bitcore/io/json.h"

namespace bitcore {
namespace {

struct FileDType {
  std::string_view name;
  std::uint64_t bits;
};

constexpr FileDType kFileDTypes[] = {
    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"BOOL", 8},        {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"F64", 64},    {"I64", 64},    {"U64", 64},    {"C64", 64}};

constexpr std::uint64_t kMostBits = 64;

// Reads one tensor's entry; every message names the file and the tensor.
class EntryReader {
 public:
  EntryReader(const std::string& name, const Json& entry, const std::string& path)
      : subject_("tensor '" + name + "'"), entry_(entry), path_(path) {}

  TensorPlace read() const {
    TensorPlace place;
    place.dtype = dtype();
    place.shape = shape();
    std::tie(place.begin, place.end) = offsets();
    check_bytes(place);
    return place;
  }

 private:
  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    fail_file(path_, parts...);
  }

  const Json& member(const char* key) const {
    if (!entry_.is_object() || !entry_.contains(key)) fail(subject_, " has no '", key, "'");
    return entry_.at(key);
  }

  std::uint64_t number(const Json& value, const char* what) const {
    const auto integer = unsigned_integer(value);
    if (!integer) fail(what, " of ", subject_, " is ", value.dump(), ", expected an integer of at least 0");
    return *integer;
  }

  std::string dtype() const {
    const Json& value = member("dtype");
    if (!value.is_string()) fail("the dtype of ", subject_, " is ", value.dump(), ", expected a string");
    return value.get<std::string>();
  }

  std::vector<std::int64_t> shape() const {
    const Json& value = member("shape");
    if (!value.is_array()) fail("the shape of ", subject_, " is ", value.dump(), ", expected a list");
    std::vector<std::int64_t> sizes;
    for (const Json& size : value) {
      const std::uint64_t extent = number(size, "a size");
      if (extent > std::uint64_t{std::numeric_limits<std::int64_t>::max()})
        fail("the shape of ", subject_, " overflows");
      sizes.push_back(static_cast<std::int64_t>(extent));
    }
    if (!element_count(sizes)) fail("the shape of ", subject_, " overflows");
    return sizes;
  }

  std::pair<std::uint64_t, std::uint64_t> offsets() const {
    const Json& value = member("data_offsets");
    if (!value.is_array() || value.size() != 2) fail("data_offsets of ", subject_, " are no pair");
    const std::uint64_t begin = number(value[0], "an offset"), end = number(value[1], "an offset");
    if (begin > end) fail(subject_, " lies at bytes ", begin, " to ", end);
    return {begin, end};
  }

  // Of a dtype that came later only its reader knows how many bytes it takes.
  void check_bytes(const TensorPlace& place) const {
    const auto bits = dtype_bits(place.dtype);
    if (!bits) return;
    const std::uint64_t expected = *element_count(place.shape) * *bits;
    const std::uint64_t bytes = place.end - place.begin;
    if (expected % 8 != 0) fail(subject_, " has ", expected, " bits, which are no whole bytes");
    if (bytes != expected / 8) fail(subject_, " has ", bytes, " bytes, its shape and dtype take ", expected / 8);
  }

  const std::string subject_;
  const Json& entry_;
  const std::string& path_;
};

std::map<std::string, std::string, std::less<>> read_metadata(const Json& json, const std::string& path) {
  if (!json.is_object()) fail_file(path, kMetadataKey, " is no JSON object");
  std::map<std::string, std::string, std::less<>> metadata;
  for (const auto& [key, text] : json.items()) {
    if (!text.is_string()) fail_file(path, kMetadataKey, " '", key, "' is ", text.dump(), ", expected a string");
    metadata.emplace(key, text.get<std::string>());
  }
  return metadata;
}

// Bytes that two tensors share, or that none owns, show another meaning to another reader. Returns the data's size.
std::uint64_t check_places(const std::map<std::string, TensorPlace, std::less<>>& tensors, const std::string& path) {
  std::vector<std::pair<const std::string*, const TensorPlace*>> places;
  for (const auto& [name, place] : tensors) places.emplace_back(&name, &place);
  std::ranges::sort(places, {}, [](const auto& each) { return std::pair(each.second->begin, each.second->end); });
  std::uint64_t end = 0;
  for (const auto& [name, place] : places) {
    if (place->begin < end)
      fail_file(path, "tensor '", *name, "' begins at byte ", place->begin, ", another ends at ", end);
    if (place->begin > end) fail_file(path, "bytes ", end, " to ", place->begin, " belong to no tensor");
    end = place->end;
  }
  return end;
}

}  // namespace

std::optional<std::uint64_t> dtype_bits(std::string_view dtype) {
  const auto* found = std::ranges::find(kFileDTypes, dtype, &FileDType::name);
  return found == std::end(kFileDTypes) ? std::nullopt : std::optional(found->bits);
}

std::optional<std::uint64_t> element_count(std::span<const std::int64_t> shape) {
  constexpr std::uint64_t kMost = std::uint64_t{std::numeric_limits<std::int64_t>::max()} / kMostBits;
  std::uint64_t count = 1;
  for (const std::int64_t size : shape) {
    const auto extent = static_cast<std::uint64_t>(size);
    if (size < 0 || (extent != 0 && count > kMost / extent)) return std::nullopt;
    count *= extent;
  }
  return count;
}

std::uint64_t header_length(std::span<const std::byte> first_bytes, const std::string& path) {
  if (first_bytes.empty()) fail_file(path, "is empty (0 bytes), a safetensors file has at least ", kHeaderLengthBytes);
  if (first_bytes.size() < kHeaderLengthBytes) {
    fail_file(path, "has ", first_bytes.size(), " bytes, a safetensors file has at least ", kHeaderLengthBytes);
  }
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kHeaderLengthBytes; ++i) length |= static_cast<std::uint64_t>(first_bytes[i]) << (8 * i);
  if (length > kMostHeaderBytes) {
    fail_file(path, "its header should have ", length, " bytes, at most ", kMostHeaderBytes,
              " are allowed: it is no safetensors file");
  }
  return length;
}

SafetensorsHeader parse_header(std::string_view text, const std::string& path) {
  constexpr int kMostDepth = 3;  // the header, a tensor, its shape
  const Json json = parse_json_object(text, path, "its header", kMostDepth);
  SafetensorsHeader header;
  for (const auto& [name, value] : json.items()) {
    if (name == kMetadataKey) {
      header.metadata = read_metadata(value, path);
    } else {
      header.tensors.emplace(name, EntryReader(name, value, path).read());
    }
  }
  header.data_bytes = check_places(header.tensors, path);
  return header;
}

}  // namespace bitcore
