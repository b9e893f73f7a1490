// ThreadPool: every task once, whatever its threads do; and what the engine makes of other executors.
#include "bitcore/executor.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <set>
#include <stdexcept>

#include "allocations.h"
#include "bitcore/base/cpu_count.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "support.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define BITLAB_THREAD_SANITIZER
#endif
#elif defined(__SANITIZE_THREAD__)
#define BITLAB_THREAD_SANITIZER
#endif

namespace bitcore {
namespace {

using testing::bits_of;
using testing::expect_error;
using testing::Floats;
using testing::on_threads;
using testing::random_floats;

std::vector<int> calls_of_each_task(Executor& executor, int count) {
  std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
  executor.run(count, [&](int task) { ++calls[static_cast<std::size_t>(task)]; });
  return {calls.begin(), calls.end()};
}

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (const int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (const int count : {0, 1, 2, 3, 8, 1000}) {
      EXPECT_EQ(calls_of_each_task(pool, count), std::vector<int>(static_cast<std::size_t>(count), 1))
          << threads << " threads, " << count << " tasks";
    }
  }
}

TEST(ThreadPool, TasksRunAtTheSameTimeOnThreadsThatAreKept) {
  constexpr int kThreads = 3;
  ThreadPool pool(kThreads);
  std::set<std::thread::id> ids[2];
  for (std::set<std::thread::id>& seen : ids) {
    std::barrier all(kThreads);  // every task waits until all have begun
    std::mutex mutex;
    pool.run(kThreads, [&](int) {
      all.arrive_and_wait();
      const std::lock_guard lock(mutex);
      seen.insert(std::this_thread::get_id());
    });
    EXPECT_EQ(seen.size(), std::size_t{kThreads});
    EXPECT_TRUE(seen.contains(std::this_thread::get_id()));
  }
  EXPECT_EQ(ids[0], ids[1]);
}

// A thread that is held up, here in the middle of a task, keeps nobody from the others; the call ends with that task.
TEST(ThreadPool, TheCallerDoesWhatLateThreadsDoNot) {
  ThreadPool pool(2);
  constexpr int kTasks = 100;
  std::atomic<bool> other_is_held_up{false}, released{false};
  std::atomic<int> done{0};
  const std::thread::id caller = std::this_thread::get_id();
  pool.run(kTasks, [&](int) {
    if (std::this_thread::get_id() != caller) {
      other_is_held_up = true;
      while (!released) std::this_thread::yield();
    } else {
      while (!other_is_held_up) std::this_thread::yield();
      if (++done == kTasks - 1) released = true;
    }
  });
  EXPECT_EQ(done, kTasks - 1);
}

// The one other thread never comes to the second call: it is still in the first, of another caller.
TEST(ThreadPool, ACallDoesNotWaitForAnother) {
  ThreadPool pool(2);
  std::atomic<int> begun{0};
  std::atomic<bool> released{false};
  std::thread first([&] {
    pool.run(2, [&](int) {
      ++begun;
      while (!released) std::this_thread::yield();
    });
  });
  while (begun < 2) std::this_thread::yield();
  EXPECT_EQ(calls_of_each_task(pool, 50), std::vector<int>(50, 1));
  released = true;
  first.join();
}

TEST(ThreadPool, CallsNest) {
  ThreadPool pool(3);
  std::atomic<int> inner{0};
  pool.run(5, [&](int) { pool.run(7, [&](int) { ++inner; }); });
  EXPECT_EQ(inner, 35);
}

TEST(ThreadPool, ManyCallersAndManyCalls) {
  ThreadPool pool(3);
  constexpr int kCallers = 4, kCalls = 400;
  std::atomic<int> wrong{0};
  on_threads(kCallers, [&](int caller) {
    for (int call = 0; call < kCalls; ++call) {
      const int count = 1 + (caller + call) % 9;
      wrong += calls_of_each_task(pool, count) != std::vector<int>(static_cast<std::size_t>(count), 1);
    }
  });
  EXPECT_EQ(wrong, 0);
}

// What a call has written is there after it, although nothing in the tasks is atomic.
TEST(ThreadPool, ACallSeesWhatItsTasksWrote) {
  ThreadPool pool(3);
  std::vector<int> values(64);
  for (int call = 0; call < 500; ++call) {
    pool.run(64, [&](int task) { values[static_cast<std::size_t>(task)] += task; });
    ASSERT_EQ(std::accumulate(values.begin(), values.end(), 0), (call + 1) * 64 * 63 / 2);
  }
}

TEST(ThreadPool, EndsWhileThreadsSleepSpinOrHaveNeverStarted) {
  for (int round = 0; round < 50; ++round) {
    ThreadPool unused(4);
    ThreadPool pool(4);
    if (round % 2 == 0) calls_of_each_task(pool, 4);
    if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(ThreadPool, AnExceptionReachesTheCallerWhenTheTasksHaveStopped) {
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    for (int throwing = 0; throwing < 6; ++throwing) {
      std::atomic<int> running{0};
      EXPECT_THROW(pool.run(6,
                            [&](int task) {
                              ++running;
                              std::this_thread::yield();
                              --running;
                              if (task == throwing) throw std::out_of_range("task");
                            }),
                   std::out_of_range);
      EXPECT_EQ(running, 0);
      EXPECT_EQ(calls_of_each_task(pool, 6), std::vector<int>(6, 1)) << "the pool works on";
    }
  }
}

TEST(ThreadPool, OneOfManyExceptionsReachesTheCaller) {
  ThreadPool pool(3);
  for (int call = 0; call < 100; ++call) {
    EXPECT_THROW(pool.run(9, [](int) { throw std::bad_alloc(); }), std::bad_alloc);
  }
}

TEST(ThreadPool, NumbersOfThreads) {
  EXPECT_EQ(ThreadPool().num_threads(), default_num_threads());
  EXPECT_EQ(ThreadPool(0).num_threads(), default_num_threads());
  EXPECT_EQ(ThreadPool(ThreadPool::kMostThreads).num_threads(), 1024);
  expect_error<QuantizationError>([] { ThreadPool pool(-1); }, {"threads is -1", "0 to 1024"});
  expect_error<QuantizationError>([] { ThreadPool pool(1025); }, {"threads is 1025", "0 to 1024"});
}

// Sets BITLAB_NUM_THREADS, and back.
class Variable {
 public:
  explicit Variable(const char* value) {
    if (const char* before = std::getenv(kName)) before_ = before;
    value == nullptr ? unsetenv(kName) : setenv(kName, value, 1);
  }
  ~Variable() { before_.empty() ? unsetenv(kName) : setenv(kName, before_.c_str(), 1); }

 private:
  static constexpr const char* kName = "BITLAB_NUM_THREADS";
  std::string before_;
};

TEST(ThreadPool, TheEnvironmentSaysHowManyThreads) {
  {
    const Variable variable("5");
    EXPECT_EQ(default_num_threads(), 5);
    EXPECT_EQ(ThreadPool().num_threads(), 5);
    EXPECT_EQ(ThreadPool(2).num_threads(), 2);
  }
  for (const char* text : {"", "0", "-2", "two", "2 ", "2.5", "1025", "99999999999999999999"}) {
    const Variable variable(text);
    expect_error<QuantizationError>([] { default_num_threads(); },
                                    {"BITLAB_NUM_THREADS is '" + std::string(text) + "'", "1 to 1024"});
    EXPECT_THROW(ThreadPool(), QuantizationError);
    EXPECT_EQ(ThreadPool(2).num_threads(), 2);
  }
}

#ifdef __linux__
TEST(ThreadPool, CountsTheCpusOfTheAffinityMask) {
  const Variable variable(nullptr);
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  EXPECT_GE(default_num_threads(), 1);
  EXPECT_LE(default_num_threads(), CPU_COUNT(&before));
  int first = 0;
  while (!CPU_ISSET(first, &before)) ++first;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  EXPECT_EQ(default_num_threads(), 1);
  EXPECT_EQ(sched_setaffinity(0, sizeof(before), &before), 0);
}
#endif

// Control groups of a process as files: its line, and what its groups hold.
double cpus_of(const std::string& line, const std::map<std::string, std::string>& files) {
  const std::string name = "bitcore_control_groups_" + std::to_string(getpid());
  const std::filesystem::path root = std::filesystem::path(::testing::TempDir()) / name;
  std::filesystem::create_directories(root);
  std::ofstream(root / "groups") << line;
  for (const auto& [file, text] : files) {
    std::filesystem::create_directories((root / file).parent_path());
    std::ofstream(root / file) << text;
  }
  const double cpus = cpus_of_control_group(root / "groups", root);
  std::filesystem::remove_all(root);
  return cpus;
}

TEST(ThreadPool, CountsTheCpusThatTheControlGroupIsWorth) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  EXPECT_EQ(cpus_of("", {}), kNone);
  EXPECT_EQ(cpus_of("0::/\n", {}), kNone);
  EXPECT_EQ(cpus_of("0::/\n", {{"cpu.max", "150000 100000\n"}}), 1.5);
  EXPECT_EQ(cpus_of("0::/a/b\n", {{"a/b/cpu.max", "max 100000\n"}}), kNone);
  EXPECT_EQ(cpus_of("0::/a/b\n", {{"a/b/cpu.max", "max 100000\n"}, {"a/cpu.max", "300000 100000\n"}}), 3);
  EXPECT_EQ(cpus_of("0::/of/the/host\n", {{"cpu.max", "200000 100000\n"}}), 2);
  EXPECT_EQ(cpus_of("0::/a\n", {{"a/cpu.max", "no numbers\n"}}), kNone);
  const std::string v1 = "3:memory:/a\n2:cpu,cpuacct:/a\n";
  EXPECT_EQ(cpus_of(v1, {{"cpu/a/cpu.cfs_quota_us", "50000"}, {"cpu/a/cpu.cfs_period_us", "100000"}}), 0.5);
  EXPECT_EQ(cpus_of(v1, {{"cpu/a/cpu.cfs_quota_us", "-1"}, {"cpu/a/cpu.cfs_period_us", "100000"}}), kNone);
}

// ---- fork ----

// The exit status of `work` in a forked process; -1 if it does not end.
template <class Work>
int status_in_child(const Work& work) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // ends a child that hangs
    _exit(work());
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#ifdef BITLAB_THREAD_SANITIZER
#define SKIP_FORK() GTEST_SKIP() << "ThreadSanitizer ends a forked process that starts a thread"
#else
#define SKIP_FORK()
#endif

// Whether `count` tasks that wait for each other can all begin: on as many threads.
bool has_threads(ThreadPool& pool, int count) {
  std::barrier all(count);
  pool.run(count, [&](int) { all.arrive_and_wait(); });
  return true;
}

TEST(ThreadPool, AForkedProcessHasThreadsOfItsOwn) {
  SKIP_FORK();
  ThreadPool used(3), unused(3);
  ASSERT_TRUE(has_threads(used, 3));
  for (int child = 0; child < 3; ++child) {
    EXPECT_EQ(status_in_child([&] {
                const bool works = has_threads(used, 3) && has_threads(unused, 3);
                const int grandchild = status_in_child([&] { return has_threads(used, 3) ? 0 : 1; });
                return works && grandchild == 0 ? 0 : 1;
              }),
              0);
  }
  EXPECT_TRUE(has_threads(used, 3)) << "the parent's are as they were";
}

TEST(ThreadPool, AForkInTheMiddleOfACall) {
  SKIP_FORK();
  ThreadPool pool(2);
  std::atomic<bool> forked{false};
  std::atomic<int> begun{0};
  std::thread caller([&] {
    pool.run(2, [&](int) {
      ++begun;
      while (!forked) std::this_thread::yield();
    });
  });
  while (begun < 2) std::this_thread::yield();
  EXPECT_EQ(status_in_child([&] { return has_threads(pool, 2) ? 0 : 1; }), 0);
  forked = true;
  caller.join();
}

TEST(ThreadPool, EndsInAForkedProcess) {
  SKIP_FORK();
  auto pool = std::make_unique<ThreadPool>(3);
  ASSERT_TRUE(has_threads(*pool, 3));
  EXPECT_EQ(status_in_child([&] {
              pool.reset();
              return 0;
            }),
            0);
  EXPECT_EQ(status_in_child([&] {
              if (!has_threads(*pool, 3)) return 1;
              pool.reset();
              return 0;
            }),
            0);
}

TEST(ThreadPool, ALayerComputesInAForkedProcess) {
  SKIP_FORK();
  constexpr std::int64_t kRows = 64, kSize = 512;
  const Floats x = random_floats(kRows * kSize, 1), weight = random_floats(kSize * kSize, 2);
  const auto forward = [&](Executor& executor) {
    const auto prepared = bitlinear::prepare_weights({weight.data(), kSize, kSize}, {}, Layout::automatic, executor);
    Floats y(kRows * kSize);
    bitlinear::forward({x.data(), kRows, kSize}, prepared, {}, {}, {y.data(), kRows, kSize}, {.executor = &executor});
    return y;
  };
  ThreadPool pool(2);
  const Floats expected = forward(pool);
  EXPECT_EQ(status_in_child([&] { return forward(pool) == expected ? 0 : 1; }), 0);
  EXPECT_EQ(forward(serial_executor()), expected);
}

// ---- what the engine makes of an executor ----

// Says what it is told about its threads and runs everything on the calling one.
class Claims final : public Executor {
 public:
  explicit Claims(int threads) : threads_(threads) {}
  int num_threads() const override { return threads_; }
  void run(int count, const std::function<void(int)>& task) override {
    for (int i = 0; i < count; ++i) task(i);
  }

 private:
  int threads_;
};

TEST(Executors, WithoutThreadsAreAnError) {
  constexpr std::int64_t kRows = 8, kOut = 32, kIn = 64;
  const Floats x = random_floats(kRows * kIn, 1), weight = random_floats(kOut * kIn, 2);
  const ConstMatrixView x_view(x.data(), kRows, kIn), weight_view(weight.data(), kOut, kIn);
  const auto prepared = bitlinear::prepare_weights(weight_view, {}, Layout::automatic, serial_executor());
  Floats y(kRows * kOut), dx(kRows * kIn), scale(1), x_scale(kRows);
  std::vector<std::int8_t> codes(kOut * kIn);
  const MatrixView y_view(y.data(), kRows, kOut), codes_view(codes.data(), kOut, kIn);
  const auto saved = bitlinear::forward_training(x_view, weight_view, {}, {}, y_view, {.executor = &serial_executor()});
  for (const int threads : {0, -3}) {
    Claims none(threads);
    const bitlinear::Options options{.executor = &none};
    const std::vector<std::string> parts = {"executor has " + std::to_string(threads) + " threads", "at least 1"};
    const auto expect = [&](auto&& call) { expect_error<QuantizationError>(call, parts); };
    expect([&] { bitlinear::prepare_weights(weight_view, {}, Layout::automatic, none); });
    expect([&] { bitlinear::forward(x_view, prepared, {}, {}, y_view, options); });
    expect([&] { bitlinear::forward_training(x_view, weight_view, {}, {}, y_view, options); });
    expect([&] { bitlinear::workspace_size(1, prepared.shape, {}, options); });
    expect([&] { bitlinear::backward(y_view, saved, {}, {.dx = {dx.data(), kRows, kIn}, .dweight = {}}, none); });
    expect([&] { compute_weight_scale(weight_view, {}, scale, none); });
    expect([&] { quantize_weight(weight_view, scale, {}, codes_view, none); });
    expect([&] { compute_x_scale(x_view, {}, x_scale, none); });
    expect([&] { unpack_weights(prepared.view(), codes_view, Verify::trailer, none); });
  }
}

// Ends the program if an exception leaves a task on one of its threads, as std::thread and OpenMP do.
class Strict final : public Executor {
 public:
  int num_threads() const override { return 2; }
  void run(int count, const std::function<void(int)>& task) override {
    std::thread other([&]() noexcept {
      for (int i = 1; i < count; i += 2) task(i);
    });
    for (int i = 0; i < count; i += 2) task(i);
    other.join();
  }
};

// What a layer computes in its whole life.
struct Results {
  std::vector<std::uint8_t> qweight;
  Floats y, training_y, dx, dweight;
  bool operator==(const Results&) const = default;
};

Results train_and_run(Executor& executor) {
  constexpr std::int64_t kRows = 40, kOut = 130, kIn = 420;
  static const Floats x = random_floats(kRows * kIn, 1), weight = random_floats(kOut * kIn, 2);
  const ConstMatrixView x_view(x.data(), kRows, kIn), weight_view(weight.data(), kOut, kIn);
  Results r{{}, Floats(kRows * kOut), Floats(kRows * kOut), Floats(kRows * kIn), Floats(kOut * kIn)};
  const bitlinear::Options options{.executor = &executor};
  const auto prepared = bitlinear::prepare_weights(weight_view, {}, Layout::automatic, executor);
  bitlinear::forward(x_view, prepared, {}, {}, {r.y.data(), kRows, kOut}, options);
  const auto saved =
      bitlinear::forward_training(x_view, weight_view, {}, {}, {r.training_y.data(), kRows, kOut}, options);
  bitlinear::backward({r.y.data(), kRows, kOut}, saved, {},
                      {.dx = {r.dx.data(), kRows, kIn}, .dweight = {r.dweight.data(), kOut, kIn}}, executor);
  r.qweight = prepared.qweight;
  return r;
}

// Each allocation fails once, on whichever thread it happens.
TEST(Executors, ALackOfMemoryInATaskReachesTheCaller) {
  const Results expected = train_and_run(serial_executor());
  ThreadPool pool(2);
  Strict strict;
  for (Executor* executor : {static_cast<Executor*>(&pool), static_cast<Executor*>(&strict)}) {
    train_and_run(*executor);
    int failures = 0;
    for (bool failed = true; failed; failures += failed) {
      testing::allocations_until_failure = failures;
      try {
        train_and_run(*executor);
        failed = testing::allocations_until_failure.exchange(-1) < 0;
      } catch (const std::bad_alloc&) {
      }
    }
    EXPECT_GT(failures, 20);
    EXPECT_EQ(train_and_run(*executor), expected);
  }
}

// Runs its tasks after each other: the first finds the others' work untouched and takes it in units.
TEST(Executors, LateThreadsChangeNoBits) {
  constexpr std::int64_t kRows = 3, kOut = 1003, kIn = 1700;  // some units per thread
  const Floats x = random_floats(kRows * kIn, 1), weight = random_floats(kOut * kIn, 2);
  for (const Layout layout : kLayouts) {
    const auto prepared = bitlinear::prepare_weights({weight.data(), kOut, kIn}, {}, layout, serial_executor());
    for (const auto& kernel : KernelRegistry::all_kernels()) {
      if (!kernel->is_supported() || !kernel->is_compatible_with({}) || kernel->name() == "ReferenceKernel") continue;
      const auto forward = [&](Executor& executor) {
        Floats y(kRows * kOut);
        bitlinear::forward({x.data(), kRows, kIn}, prepared, {}, {}, {y.data(), kRows, kOut},
                           {.executor = &executor, .kernel = kernel->name()});
        return bits_of(y);
      };
      const auto expected = forward(serial_executor());
      Claims in_order(2);
      Strict side_by_side;
      EXPECT_EQ(forward(in_order), expected) << kernel->name();
      EXPECT_EQ(forward(side_by_side), expected) << kernel->name();
    }
  }
}

}  // namespace
}  // namespace bitcore
