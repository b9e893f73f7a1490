// How the CPU rounds: to nearest and with subnormal numbers, whatever the caller has set (fesetround, flush-to-zero of
// another library). Logits would depend on it otherwise.
#pragma once

#include <cstdint>
#include <functional>

#include "bitcore/executor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitmodels {

// Sets the thread's control register for as long as it lives, and puts back what it found.
class FloatEnvironment {
 public:
  FloatEnvironment() : found_(get()) {
    if (found_ != kNormal) set(kNormal);
  }
  ~FloatEnvironment() {
    if (found_ != kNormal) set(found_);
  }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr std::uint64_t kNormal = 0x1F80;    // MXCSR: every exception masked, nearest, no flush
  static constexpr std::uint64_t kSettings = 0xFFC0;  // without the flags of exceptions that have happened
  static std::uint64_t get() { return _mm_getcsr() & kSettings; }
  static void set(std::uint64_t value) { _mm_setcsr((_mm_getcsr() & ~kSettings) | static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
  static constexpr std::uint64_t kNormal = 0;  // FPCR: the same
  static std::uint64_t get() {
    std::uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value)::"memory");
    return value;
  }
  static void set(std::uint64_t value) { asm volatile("msr fpcr, %0" ::"r"(value) : "memory"); }
#else
  static constexpr std::uint64_t kNormal = 0;
  static std::uint64_t get() { return kNormal; }
  static void set(std::uint64_t) {}
#endif

  const std::uint64_t found_;
};

// Another executor, with each task in such an environment.
class FloatExecutor final : public bitcore::Executor {
 public:
  explicit FloatExecutor(bitcore::Executor& executor) : executor_(executor) {}
  int num_threads() const override { return executor_.num_threads(); }
  void run(int count, const std::function<void(int)>& task) override {
    executor_.run(count, [&task](int index) {
      const FloatEnvironment normal;
      task(index);
    });
  }

 private:
  bitcore::Executor& executor_;
};

}  // namespace bitmodels
