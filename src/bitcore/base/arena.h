// Cuts one block of memory into aligned arrays. Without a block it only measures how large one has to be.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bitcore/base/aligned_array.h"
#include "bitcore/base/math.h"

namespace bitcore {

class Arena {
 public:
  /// Measures: take() returns null.
  Arena() = default;
  /// `memory` need not be aligned: bytes() covers what aligning it takes.
  explicit Arena(std::byte* memory)
      : memory_(memory + (kCacheLine - reinterpret_cast<std::uintptr_t>(memory) % kCacheLine) % kCacheLine) {}

  /// Uninitialized memory for `count` trivial elements, on a cache line of its own.
  template <class T>
  T* take(std::int64_t count) {
    std::byte* begin = memory_ == nullptr ? nullptr : memory_ + position_;
    const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(T));
    position_ += round_up(bytes, kLine);
    return reinterpret_cast<T*>(begin);
  }

  /// Bytes taken so far, a multiple of a cache line.
  std::int64_t position() const { return position_; }
  void skip(std::int64_t bytes) { position_ += bytes; }

  /// Size of a block, aligned or not, that holds what has been taken.
  std::size_t bytes() const { return static_cast<std::size_t>(position_ + kLine - 1); }

 private:
  static constexpr auto kLine = static_cast<std::int64_t>(kCacheLine);
  std::byte* memory_ = nullptr;
  std::int64_t position_ = 0;
};

}  // namespace bitcore
