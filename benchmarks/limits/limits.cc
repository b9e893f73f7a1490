#include "benchmarks/limits/limits.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "benchmarks/limits/loops.h"
#include "bitcore/base/aligned_array.h"
#include "bitcore/base/cpu_features.h"

namespace bitcore::limits {
namespace {

// Fastest first within a family.
std::vector<MultiplyAdds> all_loops() {
  std::vector<MultiplyAdds> loops;
  const auto add = [&](const char* name, bool supported, const Loop& loop) {
    loops.push_back({name, supported, 2 * loop.multiply_adds, loop.run});
  };
#if defined(__x86_64__)
  add("vpdpbusd zmm", cpu_has_avx512_vnni(), kDpbusdZmm);
  add("vpdpbusd ymm", cpu_has_avx512_vnni() || cpu_has_avx_vnni(),
      cpu_has_avx512_vnni() ? kDpbusdYmm : kAvxVnniDpbusdYmm);
  add("vpmaddubsw ymm", cpu_has_avx2(), kMaddubsYmm);
#elif defined(__aarch64__)
  add("sdot", cpu_has_neon_dot(), kSdot);
  add("smlal", true, kSmlal);
#endif
  add("int16 baseline", true, kInt16Baseline);
#if defined(__x86_64__)
  add("fma zmm", cpu_has_avx512(), kFmaZmm);
  add("fma ymm", cpu_has_avx2(), kFmaYmm);
#elif defined(__aarch64__)
  add("fmla", true, kFmlaNeon);
#endif
  add("float32 baseline", true, kFloat32Baseline);
  return loops;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return seconds_since(start);
}

typedef std::uint64_t Vector __attribute__((vector_size(16)));
constexpr std::size_t kVectors = 16;  // of a step: 256 bytes, four cache lines
constexpr std::size_t kStepBytes = kVectors * sizeof(Vector);

// Reads all but the last bytes, which make no step. Eight sums leave only the loads to wait for.
template <int Streams>
std::uint64_t read_streams(std::span<const std::uint8_t> bytes) {
  constexpr std::size_t kSums = 8;
  Vector sums[kSums] = {};
  const std::size_t part = bytes.size() / Streams / kStepBytes * kStepBytes;
  for (std::size_t offset = 0; offset < part; offset += kStepBytes) {
    for (std::size_t stream = 0; stream < Streams; ++stream) {
      const std::uint8_t* step = bytes.data() + stream * part + offset;
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kVectors; ++i) {
        Vector vector;  // not aligned
        std::memcpy(&vector, step + i * sizeof(Vector), sizeof(Vector));
        sums[i % kSums] ^= vector;
      }
    }
  }
  std::uint64_t total = 0;
  for (const Vector& sum : sums) total ^= sum[0] ^ sum[1];
  return total;
}

std::uint64_t read_all(std::span<const std::uint8_t> bytes, int streams) {
  switch (streams) {
    case 1:
      return read_streams<1>(bytes);
    case 2:
      return read_streams<2>(bytes);
    case 4:
      return read_streams<4>(bytes);
    default:
      return read_streams<8>(bytes);
  }
}

// A cache line that two threads write in turns: the first one odd numbers, the other one the next even number.
struct alignas(kCacheLine) Ball {
  std::atomic<int> count{0};
};

constexpr int kRoundTrips = 100;   // of a measurement: a tenth of a millisecond
constexpr double kPatience = 0.1;  // seconds after which a thread that does not answer is taken not to run

// Waits until `ball` has reached `count`. False where that takes too long.
bool wait_for(const Ball& ball, int count) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    for (int look = 0; look < 1000; ++look) {
      if (ball.count.load(std::memory_order_acquire) >= count) return true;
    }
    if (seconds_since(start) > kPatience) return false;
  }
}

bool send(Ball& ball, int round) {
  ball.count.store(2 * round + 1, std::memory_order_release);
  return wait_for(ball, 2 * round + 2);
}

bool answer(Ball& ball, int round) {
  if (!wait_for(ball, 2 * round + 1)) return false;
  ball.count.store(2 * round + 2, std::memory_order_release);
  return true;
}

}  // namespace

std::span<const MultiplyAdds> multiply_adds() {
  static const std::vector<MultiplyAdds> loops = all_loops();
  return loops;
}

double operations_per_second(const MultiplyAdds& loop, Executor& executor, std::int64_t rounds) {
  assert(loop.supported && rounds >= 1);
  const int threads = executor.num_threads();
  const double time = seconds([&] { executor.run(threads, [&](int) { loop.run(rounds); }); });
  return static_cast<double>(loop.operations) * static_cast<double>(rounds) * threads / time;
}

std::int64_t least_bytes(const Executor& executor, int streams) {
  return static_cast<std::int64_t>(kStepBytes) * executor.num_threads() * streams;
}

double bytes_per_second(std::span<const std::uint8_t> bytes, Executor& executor, int streams, std::int64_t repeats) {
  assert(repeats >= 1);
  const std::size_t threads = static_cast<std::size_t>(executor.num_threads());
  const std::size_t share = bytes.size() / threads;
  std::atomic<std::uint64_t> used{0};  // what was read must matter
  const double time = seconds([&] {
    executor.run(static_cast<int>(threads), [&](int thread) {
      const auto part = bytes.subspan(static_cast<std::size_t>(thread) * share, share);
      std::uint64_t total = 0;
      for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
        total += read_all(part, streams);
        asm volatile("" : : : "memory");  // the next time may find other bytes
      }
      used += total;
    });
  });
  const std::size_t step = static_cast<std::size_t>(streams) * kStepBytes;
  return static_cast<double>(share / step * step * threads) * static_cast<double>(repeats) / time;
}

double round_trip_seconds(Executor& executor, int repeats) {
  const int threads = executor.num_threads();
  assert(threads >= 2 && repeats >= 1);
  std::vector<Ball> balls(static_cast<std::size_t>(threads));
  std::vector<double> slowest(static_cast<std::size_t>(repeats), 0.0);
  std::atomic<bool> complete{true};
  executor.run(threads, [&](int thread) {
    // One after another, so that no two pairs disturb each other; those that wait for their turn only read.
    const int first = thread == 0 ? 1 : thread, last = thread == 0 ? threads - 1 : thread;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      for (int other = first; other <= last; ++other) {
        Ball& ball = balls[static_cast<std::size_t>(other)];
        const auto start = std::chrono::steady_clock::now();
        for (int round = repeat * kRoundTrips; round < (repeat + 1) * kRoundTrips; ++round) {
          if (complete && (thread == 0 ? send(ball, round) : answer(ball, round))) continue;
          complete = false;
          return;
        }
        if (thread != 0) continue;
        double& time = slowest[static_cast<std::size_t>(repeat)];
        time = std::max(time, seconds_since(start) / kRoundTrips);
      }
    }
  });
  if (!complete) return std::numeric_limits<double>::infinity();
  const auto middle = slowest.begin() + repeats / 2;
  std::nth_element(slowest.begin(), middle, slowest.end());
  return *middle;
}

}  // namespace bitcore::limits
