// Threads that are kept; who takes which task.
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "bitcore/base/aligned_array.h"
#include "bitcore/base/checks.h"
#include "bitcore/base/cpu_count.h"
#include "bitcore/executor.h"

namespace bitcore {
namespace {

using Task = std::function<void(int)>;

// How long a thread that has nothing to do waits before it sleeps: longer than what lies between two layers of a model,
// much shorter than a time slice. To wake a thread takes 5 to 50 us.
constexpr std::chrono::microseconds kSpin{100};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for done(), at most kSpin.
template <class Done>
void spin(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
}

// How many forks lie between the first process that had a pool and this one: threads of another one are not here.
std::atomic<unsigned> forks{0};

void count_forks() {
  static const int error = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  if (error != 0) throw std::bad_alloc();
}

}  // namespace

// The threads of one process, and the call that they work on.
//
// A call has `count` tasks. The first is the caller's, the next ones have a thread each, which begins with its own: in
// every call the same thread works on the same part of the data. Whoever is done takes the rest, and then what another
// thread has not begun. What a call consists of is written before its first task is offered and stays until the last
// one is done, and who takes a task acquires what its offer released; so a thread may come late, even to the next call:
// what it takes is a task of the call that then runs.
class ThreadPool::Team {
 public:
  explicit Team(int threads)
      : process_(forks.load(std::memory_order_relaxed)),
        spins_(threads <= usable_cpus()),
        seats_(static_cast<std::size_t>(threads - 1)) {
    threads_.reserve(seats_.size());
  }

  ~Team() {
    for (Seat& seat : seats_) seat.put(Seat::stop);
    for (std::thread& thread : threads_) thread.join();
  }

  // Whether its threads are those of this process.
  bool is_here() const { return process_ == forks.load(std::memory_order_relaxed); }

  // False, and nothing is done, if another call has the threads.
  bool run(int count, const Task& task) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    start_threads();
    offer(count, task);
    execute(0);
    execute_unclaimed();
    wait();
    const std::exception_ptr error = std::exchange(error_, nullptr);
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
    return true;
  }

 private:
  // Where a thread finds its own task.
  struct alignas(kCacheLine) Seat {
    enum State : int { empty, asleep, offered, stop };
    std::atomic<int> state{empty};

    void put(State next) {
      if (state.exchange(next, std::memory_order_acq_rel) == asleep) state.notify_one();
    }
    bool take() {
      int expected = offered;
      return state.load(std::memory_order_relaxed) == offered &&
             state.compare_exchange_strong(expected, empty, std::memory_order_acquire, std::memory_order_relaxed);
    }
  };

  // As many as the system gives.
  void start_threads() {
    if (started_) return;
    started_ = true;
    try {
      for (Seat& seat : seats_) threads_.emplace_back([this, &seat] { work(seat); });
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
  }

  void offer(int count, const Task& task) {
    task_ = &task;
    count_ = count;
    failed_.store(false, std::memory_order_relaxed);
    unfinished_.store(count, std::memory_order_relaxed);
    const int seats = std::min(count - 1, static_cast<int>(threads_.size()));
    unclaimed_.store(count - 1 - seats, std::memory_order_release);
    for (int i = 0; i < seats; ++i) seats_[static_cast<std::size_t>(i)].put(Seat::offered);
  }

  void execute(int index) {
    if (!failed_.load(std::memory_order_relaxed)) {
      try {
        (*task_)(index);
      } catch (...) {
        if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
      }
    }
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }

  void execute_unclaimed() {
    for (int left = unclaimed_.load(std::memory_order_relaxed); left > 0;) {
      if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed)) {
        continue;
      }
      execute(count_ - left);
      left = unclaimed_.load(std::memory_order_relaxed);
    }
    for (std::size_t i = 0; i < seats_.size(); ++i) {
      if (seats_[i].take()) execute(static_cast<int>(i) + 1);
    }
  }

  // For tasks that other threads have begun.
  void wait() {
    if (spins_) spin([&] { return unfinished_.load(std::memory_order_relaxed) == 0; });
    for (int left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) {
      unfinished_.wait(left, std::memory_order_acquire);
    }
  }

  // What a thread of the team does.
  void work(Seat& seat) {
    for (;;) {
      if (spins_) spin([&] { return seat.state.load(std::memory_order_relaxed) != Seat::empty; });
      int expected = Seat::empty;
      if (seat.state.compare_exchange_strong(expected, Seat::asleep, std::memory_order_acq_rel)) {
        seat.state.wait(Seat::asleep, std::memory_order_acquire);
      }
      if (seat.state.load(std::memory_order_acquire) == Seat::stop) return;
      if (seat.take()) execute(static_cast<int>(&seat - seats_.data()) + 1);
      execute_unclaimed();
    }
  }

  const unsigned process_;
  const bool spins_;  // not if threads wait for each other's CPU
  std::vector<Seat> seats_;
  std::vector<std::thread> threads_;
  bool started_ = false;

  std::atomic<bool> busy_{false};
  const Task* task_ = nullptr;
  int count_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  alignas(kCacheLine) std::atomic<int> unclaimed_{0};   // of the last tasks, which are nobody's own
  alignas(kCacheLine) std::atomic<int> unfinished_{0};  // tasks
};

namespace {

int checked_threads(int threads) {
  if (threads < 0 || threads > ThreadPool::kMostThreads) {
    fail("threads is ", threads, ", expected 0 to ", ThreadPool::kMostThreads);
  }
  return threads == 0 ? default_num_threads() : threads;
}

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(checked_threads(threads)) {}

ThreadPool::~ThreadPool() {
  Team* const team = team_.load(std::memory_order_acquire);
  if (team != nullptr && team->is_here()) delete team;
}

// A team of the parent's is left as it is: its threads are not here, its caller may be in the middle of a call.
ThreadPool::Team& ThreadPool::team() {
  Team* team = team_.load(std::memory_order_acquire);
  if (team != nullptr && team->is_here()) return *team;
  count_forks();
  auto made = std::make_unique<Team>(threads_);
  if (team_.compare_exchange_strong(team, made.get(), std::memory_order_acq_rel, std::memory_order_acquire)) {
    return *made.release();
  }
  return *team;  // of another thread that was here first
}

void ThreadPool::run(int count, const std::function<void(int)>& task) {
  if (count > 1 && threads_ > 1 && team().run(count, task)) return;
  for (int i = 0; i < count; ++i) task(i);
}

}  // namespace bitcore
