/// @file executor.h
/// Who provides the threads. The engine hands tasks to an Executor: the process's ThreadPool unless a call names
/// another.
#pragma once

#include <atomic>
#include <functional>

namespace bitcore {

/// Runs independent tasks, possibly at the same time. Implementations are re-entrant.
class Executor {
 public:
  virtual ~Executor() = default;

  /// How many tasks can run at the same time, at least 1: with less, every call that uses the executor throws a
  /// QuantizationError.
  virtual int num_threads() const = 0;

  /// Calls `task(i)` once for every i in [0, count), in any order and on any thread; returns when all are done. The
  /// engine's tasks do not throw: what goes wrong in them is thrown on the calling thread afterwards.
  virtual void run(int count, const std::function<void(int)>& task) = 0;
};

/// Threads that are kept from call to call: they wait briefly for the next call, then sleep.
///
/// run() returns when its tasks are done, not when every thread has taken part. The calling thread works, too, and
/// takes over the tasks that no other has begun: a thread that the system does not schedule costs its share of the
/// speed, and a call waits for no more than the tasks that others have begun. If the system refuses a thread, the pool
/// does without it.
///
/// Any number of threads may call run() at once, tasks included: while the threads are busy with one call, another
/// computes alone on the thread that calls. No call may be running when the pool is destroyed.
///
/// Threads start with the first call that needs them. A process made by fork() has none of its parent's: it starts its
/// own in the same way, whatever the parent's were doing.
class ThreadPool final : public Executor {
 public:
  /// Most threads of a pool.
  static constexpr int kMostThreads = 1024;

  /// @param threads At most so many work at the same time, the calling one included; 0: default_num_threads().
  /// @throws QuantizationError if `threads` is negative or above kMostThreads, and as default_num_threads().
  explicit ThreadPool(int threads = 0);

  /// Ends the threads.
  ~ThreadPool() override;

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const override { return threads_; }

  /// Executor::run() for tasks that may throw: the first exception is thrown here after all tasks that had begun have
  /// returned; the others are left out.
  void run(int count, const std::function<void(int)>& task) override;

 private:
  class Team;
  Team& team();

  const int threads_;
  std::atomic<Team*> team_{nullptr};
};

/// The number in the environment variable BITLAB_NUM_THREADS if it is set; otherwise the CPUs that this process may
/// use: those of its affinity mask, no more than its control group's quota of CPU time is worth.
/// @throws QuantizationError if the variable holds anything but a number from 1 to ThreadPool::kMostThreads.
int default_num_threads();

/// Everything on the calling thread.
Executor& serial_executor();

/// The process's ThreadPool of default_num_threads() threads, made at first use. It is never destroyed: code that is
/// unloaded before the process ends (a plugin) brings a ThreadPool of its own.
/// @throws QuantizationError as default_num_threads(), if that is the first use.
Executor& default_executor();

}  // namespace bitcore
