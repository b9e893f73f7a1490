/// @file exceptions.h
/// The errors that BitLab throws. Mirrors `bitcore.exceptions`.
#pragma once

#include <stdexcept>
#include <string>

namespace bitcore {

/// Base of every error that the engine throws on purpose.
class BitLabError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument that cannot be quantized or does not fit the others: shape, dtype, scale, packed bytes, config.
class QuantizationError : public BitLabError {
 public:
  using BitLabError::BitLabError;
};

/// A file that cannot be read or written, is damaged or foreign, or does not belong with the files beside it. The
/// message begins with its path.
class FileError : public QuantizationError {
 public:
  using QuantizationError::QuantizationError;
};

/// A call that the object's present state does not allow.
class StateError : public BitLabError {
 public:
  using BitLabError::BitLabError;
};

/// No kernel of the asked name exists, runs on this CPU, or covers the config.
class KernelNotFoundError : public BitLabError {
 public:
  using BitLabError::BitLabError;
};

}  // namespace bitcore
