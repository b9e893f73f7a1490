/// @file executor.h
/// Who provides the threads. The engine never creates any by itself: it hands tasks to an Executor.
#pragma once

#include <functional>

namespace bitcore {

/// Runs independent tasks, possibly at the same time. Implementations are re-entrant.
class Executor {
 public:
  virtual ~Executor() = default;

  /// How many tasks can run at the same time, at least 1.
  virtual int num_threads() const = 0;

  /// Calls `task(i)` once for every i in [0, count), in any order and on any thread; returns when all are done.
  /// A task does not throw.
  virtual void run(int count, const std::function<void(int)>& task) = 0;
};

/// Everything on the calling thread.
Executor& serial_executor();

/// OpenMP's threads where the engine was built with OpenMP, else serial_executor().
Executor& default_executor();

}  // namespace bitcore
