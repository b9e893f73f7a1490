/// @file io.h
/// Opens a safetensors file by mmap and hands out checked views of it.
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
  std::string name;                 ///< For error messages: the file and the tensor.
  std::string dtype;                ///< As the file names it: "F32", "BF16", "F16", "U8", "I8", ...
  std::vector<std::int64_t> shape;  ///< Empty: a scalar.
  std::span<const std::byte> bytes;

  std::int64_t numel() const;

  /// A 2-D tensor of a dtype that the engine knows.
  /// @throws QuantizationError otherwise.
  ConstMatrixView matrix() const;

  /// A tensor of at most one dimension of a floating dtype.
  /// @throws QuantizationError otherwise.
  ConstVectorView vector() const;

  /// A floating tensor of any shape, flat, widened to float32.
  /// @throws QuantizationError where the dtype is not floating.
  std::vector<float> floats() const;
};

/// A safetensors file, mapped read-only. Every offset, size and shape is checked when it is opened. A tensor that the
/// file does not align is copied.
class SafetensorsFile {
 public:
  /// @throws QuantizationError where the file cannot be read, is truncated or is no valid safetensors file.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  bool contains(std::string_view name) const;

  /// @throws QuantizationError that names the tensor and the file where it is missing.
  const TensorEntry& tensor(std::string_view name) const;

  /// Sorted by name.
  const std::map<std::string, TensorEntry, std::less<>>& tensors() const;

  /// The header's `__metadata__`, string to string.
  const std::map<std::string, std::string, std::less<>>& metadata() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitcore
