/// @file io.h
/// Opens a safetensors file by mmap, or one that lies in memory, and hands out checked views of it.
/// Format: 8 bytes little-endian header length, a JSON header, the tensors' bytes (huggingface.co/docs/safetensors).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bitcore/tensor.h"

namespace bitcore {

/// One tensor of a file. The bytes live as long as the SafetensorsFile.
struct TensorEntry {
  std::string name;                  ///< For error messages: the file and the tensor.
  std::string dtype;                 ///< As the file names it: "F32", "BF16", "F16", "U8", "I8", or any other.
  std::vector<std::int64_t> shape;   ///< Empty: a scalar.
  std::span<const std::byte> bytes;  ///< Row-major, aligned for one element of the dtype.

  /// Number of elements: the product of the shape.
  std::int64_t numel() const;

  /// A 2-D tensor of a dtype that the engine knows.
  /// @throws FileError otherwise.
  ConstMatrixView matrix() const;

  /// A tensor of at most one dimension of a floating dtype.
  /// @throws FileError otherwise.
  ConstVectorView vector() const;

  /// A floating tensor of any shape, flat, widened to float32.
  /// @throws FileError where the dtype is not floating.
  std::vector<float> floats() const;
};

/// A safetensors file, mapped read-only, or its bytes in memory. Every offset, size and shape is checked when it is
/// opened; bytes that belong to two tensors or to none are refused. Tensors of dtypes that the engine does not know are
/// listed like all others. A tensor that the file does not align is copied.
///
/// What cannot be mapped (a pipe, a special file system) is read into memory.
class SafetensorsFile {
 public:
  /// @throws FileError where the file cannot be read, is truncated or is no valid safetensors file.
  explicit SafetensorsFile(const std::string& path);

  /// The same of a file's bytes in memory: part of the program, or received from elsewhere. The tensors are views of
  /// `bytes`, which stay alive and unchanged as long as this object is used.
  /// @param bytes The whole file.
  /// @param name  Stands for the path in error messages.
  /// @throws FileError where the bytes are truncated or no valid safetensors file.
  /// @throws QuantizationError where `bytes` is null and not empty.
  static SafetensorsFile from_bytes(std::span<const std::byte> bytes, std::string name);

  ~SafetensorsFile();
  /// Tensors and views of `other` stay valid: they belong to the new object.
  SafetensorsFile(SafetensorsFile&& other) noexcept;
  /// As the constructor.
  SafetensorsFile& operator=(SafetensorsFile&& other) noexcept;

  /// Whether the file has a tensor of this name.
  bool contains(std::string_view name) const;

  /// @throws FileError that names the tensor and the file where it is missing.
  const TensorEntry& tensor(std::string_view name) const;

  /// All tensors, sorted by name.
  const std::map<std::string, TensorEntry, std::less<>>& tensors() const;

  /// The header's `__metadata__`, string to string.
  const std::map<std::string, std::string, std::less<>>& metadata() const;

 private:
  struct Impl;
  explicit SafetensorsFile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitcore
