// How the engine splits loops over an Executor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "bitcore/executor.h"

namespace bitcore {

/// Calls range(begin, end) over [0, count) in at most one contiguous range a thread, each of at least `min_range`
/// where more than one is used.
template <class Range>
void parallel_ranges(Executor& executor, std::int64_t count, std::int64_t min_range, const Range& range) {
  if (count <= 0) return;
  const std::int64_t most = std::max<std::int64_t>(1, count / std::max<std::int64_t>(1, min_range));
  const int tasks = static_cast<int>(std::min<std::int64_t>(executor.num_threads(), most));
  if (tasks == 1) {
    range(std::int64_t{0}, count);
    return;
  }
  executor.run(tasks, [&](int task) { range(count * task / tasks, count * (task + 1) / tasks); });
}

}  // namespace bitcore
