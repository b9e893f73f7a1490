// How the engine splits work over an Executor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "bitcore/base/checks.h"
#include "bitcore/executor.h"

namespace bitcore {

/// How many tasks the executor runs at the same time.
/// @throws QuantizationError if it has no threads.
inline int threads_of(const Executor& executor) {
  const int threads = executor.num_threads();
  if (threads < 1) fail("executor has ", threads, " threads, expected at least 1");
  return threads;
}

/// Runs tasks that may throw (a lack of memory) on any executor, whose threads no exception may leave: the first one is
/// thrown here once all tasks have returned. Tasks that begin after it do nothing.
template <class Task>
void run_tasks(Executor& executor, int count, const Task& task) {
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto guarded = [&](int index) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      task(index);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  executor.run(count, [&guarded](int index) { guarded(index); });  // one reference fits std::function
  if (error) std::rethrow_exception(error);
}

/// Calls range(begin, end) over [0, count) in at most one contiguous range per thread, each of at least `min_range`
/// if more than one is used.
/// @throws QuantizationError if the executor has no threads, and what a range throws.
template <class Range>
void parallel_ranges(Executor& executor, std::int64_t count, std::int64_t min_range, const Range& range) {
  const int threads = threads_of(executor);
  if (count <= 0) return;
  const std::int64_t most = std::max<std::int64_t>(1, count / std::max<std::int64_t>(1, min_range));
  const int tasks = static_cast<int>(std::min<std::int64_t>(threads, most));
  if (tasks == 1) {
    range(std::int64_t{0}, count);
    return;
  }
  run_tasks(executor, tasks, [&](int task) { range(count * task / tasks, count * (task + 1) / tasks); });
}

}  // namespace bitcore
