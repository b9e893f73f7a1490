// safetensors: views of a file that is mapped, read, or in the caller's memory. Every number of the header is checked
// against the file before a view is made.
#include "bitcore/io.h"

#include <optional>
#include <utility>

#include "bitcore/base/checks.h"
#include "bitcore/base/float_types-inl.h"
#include "bitcore/io/input_file.h"
#include "bitcore/io/safetensors_header.h"

namespace bitcore {
namespace {

DType engine_dtype(const TensorEntry& entry) {
  const std::string& name = entry.dtype;
  if (name == "F32") return DType::float32;
  if (name == "BF16") return DType::bfloat16;
  if (name == "F16") return DType::float16;
  if (name == "I8") return DType::int8;
  if (name == "U8") return DType::uint8;
  fail_file(entry.name, "has dtype ", name, ", expected F32, BF16, F16, I8 or U8");
}

DType floating_dtype(const TensorEntry& entry) {
  const DType dtype = engine_dtype(entry);
  if (!is_floating(dtype)) fail_file(entry.name, "has dtype ", entry.dtype, ", expected F32, BF16 or F16");
  return dtype;
}

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

std::int64_t TensorEntry::numel() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

ConstMatrixView TensorEntry::matrix() const {
  if (shape.size() != 2) fail_file(name, "has ", shape.size(), " dimensions, expected 2");
  return {bytes.data(), engine_dtype(*this), shape[0], shape[1], shape[1]};
}

ConstVectorView TensorEntry::vector() const {
  if (shape.size() > 1) fail_file(name, "has ", shape.size(), " dimensions, expected at most 1");
  return {bytes.data(), floating_dtype(*this), numel()};
}

std::vector<float> TensorEntry::floats() const {
  const DType dtype = floating_dtype(*this);
  std::vector<float> values(static_cast<std::size_t>(numel()));
  widen(bytes.data(), dtype, numel(), values.data());
  return values;
}

struct SafetensorsFile::Impl {
  explicit Impl(const std::string& file_path) : path(file_path) {
    const InputFile file(path);
    mapping = file.map();
    if (mapping) {
      read(mapping->bytes());
    } else {
      read(file);
    }
  }
  Impl(std::span<const std::byte> file, std::string name) : path(std::move(name)) { read(file); }

  std::string path;
  std::optional<Mapping> mapping;
  std::vector<std::byte> content;               // of a file that was read
  std::vector<std::vector<std::byte>> aligned;  // copies of tensors
  std::map<std::string, TensorEntry, std::less<>> tensors;
  std::map<std::string, std::string, std::less<>> metadata;

  void read(std::span<const std::byte> file) {
    const std::uint64_t length = header_length(file, path);
    file = file.subspan(kHeaderLengthBytes);
    if (length > file.size()) fail_short_header(length, file.size());
    SafetensorsHeader header = parse_header(text_of(file.first(length)), path);
    file = file.subspan(length);
    if (header.data_bytes > file.size()) fail_short_data(header, file.size());
    if (header.data_bytes < file.size()) fail_trailing(header, std::to_string(file.size() - header.data_bytes));
    take(std::move(header), file);
  }

  // From front to back, no further than the header says: the file may have no end.
  void read(const InputFile& file) {
    file.append_to(content, kHeaderLengthBytes);
    const std::uint64_t length = header_length(content, path);
    content.clear();
    file.append_to(content, length);
    if (content.size() < length) fail_short_header(length, content.size());
    SafetensorsHeader header = parse_header(text_of(content), path);
    content.clear();
    file.append_to(content, header.data_bytes);
    if (content.size() < header.data_bytes) fail_short_data(header, content.size());
    std::vector<std::byte> behind;
    file.append_to(behind, 1);
    if (!behind.empty()) fail_trailing(header, "more");
    take(std::move(header), content);
  }

  void take(SafetensorsHeader header, std::span<const std::byte> data) {
    metadata = std::move(header.metadata);
    for (auto& [name, place] : header.tensors) {
      TensorEntry entry{path + ": tensor '" + name + "'", std::move(place.dtype), std::move(place.shape),
                        data.subspan(place.begin, place.end - place.begin)};
      align(entry);
      tensors.emplace(name, std::move(entry));
    }
  }

  // A file need not align its tensors, but the engine reads whole elements.
  void align(TensorEntry& entry) {
    const std::uint64_t element = std::max<std::uint64_t>(dtype_bits(entry.dtype).value_or(64) / 8, 1);
    if (reinterpret_cast<std::uintptr_t>(entry.bytes.data()) % element == 0 || entry.bytes.empty()) return;
    aligned.emplace_back(entry.bytes.begin(), entry.bytes.end());
    entry.bytes = aligned.back();
  }

  [[noreturn]] void fail_short_header(std::uint64_t expected, std::size_t found) const {
    fail_file(path, "its header should have ", expected, " bytes, but ", found,
              " follow: it is truncated or no safetensors file");
  }
  [[noreturn]] void fail_short_data(const SafetensorsHeader& header, std::size_t found) const {
    fail_file(path, "its tensors take ", header.data_bytes, " bytes, but ", found, " follow: it is truncated");
  }
  [[noreturn]] void fail_trailing(const SafetensorsHeader& header, const std::string& count) const {
    fail_file(path, "its tensors take ", header.data_bytes, " bytes, but ", count, " follow them");
  }
};

SafetensorsFile::SafetensorsFile(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
SafetensorsFile::SafetensorsFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

SafetensorsFile SafetensorsFile::from_bytes(std::span<const std::byte> bytes, std::string name) {
  check_span(bytes, "bytes");
  return SafetensorsFile(std::make_unique<Impl>(bytes, std::move(name)));
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

const std::string& SafetensorsFile::path() const { return impl_->path; }

bool SafetensorsFile::contains(std::string_view name) const {
  return impl_->tensors.find(name) != impl_->tensors.end();
}

const TensorEntry& SafetensorsFile::tensor(std::string_view name) const {
  const auto found = impl_->tensors.find(name);
  if (found == impl_->tensors.end()) fail_file(impl_->path, "has no tensor '", name, "'");
  return found->second;
}

const std::map<std::string, TensorEntry, std::less<>>& SafetensorsFile::tensors() const { return impl_->tensors; }

const std::map<std::string, std::string, std::less<>>& SafetensorsFile::metadata() const { return impl_->metadata; }

}  // namespace bitcore
