// A heap array aligned to a cache line, the width of the widest vector register.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace bitcore {

inline constexpr std::size_t kCacheLine = 64;

/// Uninitialized memory for `count` trivial elements.
template <class T>
class AlignedArray {
 public:
  explicit AlignedArray(std::int64_t count)
      : data_(static_cast<T*>(
            ::operator new (static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{kCacheLine}))) {}
  ~AlignedArray() { ::operator delete (data_, std::align_val_t{kCacheLine}); }
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace bitcore
