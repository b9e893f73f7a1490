// The limits in plain C, for `bitlab bench`, which loads them with ctypes (python/bitlab/bench/limits_library.py).
//
// Arguments are checked there; nothing here throws. Threads are the caller's: bounds are compared with kernels, so both
// must run on the same threads.
#include <cstdint>
#include <functional>
#include <span>

#include "benchmarks/limits/limits.h"

namespace bitcore::limits {
namespace {

using Task = void(std::int64_t begin, std::int64_t end, void* context);
/// Splits [begin, end) into ranges of at least `grain` and calls the task for each. The type of torch_parallel_for in
/// torch's stable ABI; the status is 0 if all went well.
using ParallelFor = std::int32_t(std::int64_t begin, std::int64_t end, std::int64_t grain, Task* task, void* context);

class CallersThreads final : public Executor {
 public:
  CallersThreads(int threads, ParallelFor* parallel_for) : threads_(threads), parallel_for_(parallel_for) {}

  int num_threads() const override { return threads_; }
  void run(int count, const std::function<void(int)>& task) override {
    const auto call = [](std::int64_t begin, std::int64_t end, void* context) {
      for (std::int64_t i = begin; i < end; ++i) (*static_cast<const std::function<void(int)>*>(context))(int(i));
    };
    parallel_for_(0, count, /*grain=*/1, call, const_cast<std::function<void(int)>*>(&task));
  }

 private:
  int threads_;
  ParallelFor* parallel_for_;
};

const MultiplyAdds& loop(int index) { return multiply_adds()[static_cast<std::size_t>(index)]; }

}  // namespace
}  // namespace bitcore::limits

#define BITLAB_LIMITS_API extern "C" __attribute__((visibility("default")))

using bitcore::limits::CallersThreads;
using bitcore::limits::ParallelFor;

/// How many loops of multiply-adds there are; the functions below take an index under it.
BITLAB_LIMITS_API int bitlab_limits_count() { return static_cast<int>(bitcore::limits::multiply_adds().size()); }

/// A string literal.
BITLAB_LIMITS_API const char* bitlab_limits_name(int index) { return bitcore::limits::loop(index).name.data(); }

/// 1 if this CPU runs the loop, else 0.
BITLAB_LIMITS_API int bitlab_limits_supported(int index) { return bitcore::limits::loop(index).supported ? 1 : 0; }

/// Operations of one round.
BITLAB_LIMITS_API std::int64_t bitlab_limits_operations(int index) { return bitcore::limits::loop(index).operations; }

/// operations_per_second of a supported loop.
BITLAB_LIMITS_API double bitlab_limits_multiply_adds(int index, std::int64_t rounds, int threads,
                                                     ParallelFor* parallel_for) {
  CallersThreads executor(threads, parallel_for);
  return bitcore::limits::operations_per_second(bitcore::limits::loop(index), executor, rounds);
}

/// least_bytes.
BITLAB_LIMITS_API std::int64_t bitlab_limits_least_bytes(int streams, int threads) {
  return bitcore::limits::least_bytes(CallersThreads(threads, nullptr), streams);
}

/// bytes_per_second of a read of `size` bytes.
BITLAB_LIMITS_API double bitlab_limits_read(const std::uint8_t* bytes, std::int64_t size, int streams,
                                            std::int64_t repeats, int threads, ParallelFor* parallel_for) {
  CallersThreads executor(threads, parallel_for);
  return bitcore::limits::bytes_per_second({bytes, static_cast<std::size_t>(size)}, executor, streams, repeats);
}

/// round_trip_seconds of at least 2 threads.
BITLAB_LIMITS_API double bitlab_limits_round_trip(int repeats, int threads, ParallelFor* parallel_for) {
  CallersThreads executor(threads, parallel_for);
  return bitcore::limits::round_trip_seconds(executor, repeats);
}
