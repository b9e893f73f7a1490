/// @file io.h
/// Reads safetensors files, mapped or in memory, as checked views, and writes them.
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
  /// @throws QuantizationError for an empty path.
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

  /// The path, or the name that stands for it in error messages.
  const std::string& path() const;

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

/// Collects tensors and writes them as one safetensors file.
///
/// The data begin at a multiple of 64 bytes, and tensors whose size is a multiple of 64 come first: where the file is
/// mapped, each of those begins on a cache line. The others are aligned for their elements. What is added is viewed,
/// not copied: it stays alive and unchanged until it is written.
class SafetensorsWriter {
 public:
  /// Without tensors.
  SafetensorsWriter();
  ~SafetensorsWriter();
  /// Takes the tensors of `other`, which can only be assigned to afterwards.
  SafetensorsWriter(SafetensorsWriter&& other) noexcept;
  /// As the constructor.
  SafetensorsWriter& operator=(SafetensorsWriter&& other) noexcept;

  /// Adds a matrix; its rows may lie apart.
  /// @throws QuantizationError for a name that is taken, is "__metadata__" or no UTF-8, and for a view without memory.
  void add(std::string name, ConstMatrixView tensor);

  /// Adds a vector.
  /// @throws QuantizationError as for a matrix.
  void add(std::string name, ConstVectorView tensor);

  /// Adds a tensor of any shape, a scalar (no sizes) too, and of any dtype of the format.
  /// @param dtype As the format names it: "F32", "BF16", "I64", ...
  /// @param bytes Row-major and contiguous.
  /// @throws QuantizationError as for a matrix, for an unknown dtype, and for bytes that do not fit dtype and shape.
  void add(std::string name, std::string dtype, std::vector<std::int64_t> shape, std::span<const std::byte> bytes);

  /// Sets an entry of `__metadata__`.
  /// @throws QuantizationError if one of both is no UTF-8.
  void set_metadata(std::string key, std::string value);

  /// Writes the file beside its place, waits until it is on the disk, and renames it. A file of that name stays what it
  /// was until the new one is complete; views of it stay valid. Concurrent calls for one path are safe: one of them
  /// wins. A pipe or a device is written directly.
  /// @throws FileError where it cannot be written: nothing has changed and no temporary file remains.
  /// @throws QuantizationError for an empty path, and where names and metadata exceed the format's 100 MB.
  void save(const std::string& path) const;

  /// The same file in memory.
  /// @throws QuantizationError where names and metadata exceed the format's 100 MB.
  std::vector<std::byte> to_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitcore
