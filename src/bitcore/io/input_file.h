// A file that is open for reading: mapped where the system can, otherwise read from front to back.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace bitcore {

/// Bytes mapped read-only. They outlive the file's name.
class Mapping {
 public:
  Mapping(const void* data, std::size_t size) : data_(data), size_(size) {}
  Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Mapping& operator=(Mapping other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Mapping();

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  const void* data_;
  std::size_t size_;
};

class InputFile {
 public:
  /// @throws FileError where it cannot be opened.
  /// @throws QuantizationError for an empty path.
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  /// The whole file. None for what has no size before it is read (a pipe, a file of /proc), and for file systems that
  /// map nothing.
  std::optional<Mapping> map() const;

  /// Appends the next `count` bytes, or as many as there are. Memory grows with what arrives, not with `count`.
  /// @throws FileError
  void append_to(std::vector<std::byte>& bytes, std::size_t count) const;

 private:
  const std::string& path_;
  int descriptor_ = -1;
};

}  // namespace bitcore
