// What this machine can do at most: the rate of its multiply-add instructions, and of reading memory. For benchmarks,
// which hold a kernel's time against both; not part of the installed library.
//
// Each instruction set's loops are in a file of its own, compiled for it, as the kernels are.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "bitcore/executor.h"

namespace bitcore::limits {

/// A loop of one kind of multiply-add on registers, with enough independent sums to fill the units that do it.
struct MultiplyAdds {
  std::string_view name;
  bool supported;           // by this CPU
  std::int64_t operations;  // of one round: two for each multiply-add
  void (*run)(std::int64_t rounds);
};

/// Every loop that this architecture has, whether this CPU runs it or not.
std::span<const MultiplyAdds> multiply_adds();

/// Operations per second of all threads together, each of which runs `rounds` rounds (at least 1). `loop` is supported.
double operations_per_second(const MultiplyAdds& loop, Executor& executor, std::int64_t rounds);

/// A thread's share of memory may be read as this many parts side by side at most.
inline constexpr int kMostStreams = 8;

/// The fewest bytes that bytes_per_second takes: one step of each stream of each thread.
std::int64_t least_bytes(const Executor& executor, int streams);

/// Bytes per second of all threads together, each of which reads its share of `bytes` `repeats` times (at least 1).
/// A share is read as `streams` (1, 2, 4 or 8) parts side by side; what makes no whole step of each is left out.
double bytes_per_second(std::span<const std::uint8_t> bytes, Executor& executor, int streams, std::int64_t repeats);

/// Seconds that a cache line takes from the first thread to another one and back, of the slowest of the others: the
/// median of `repeats` (at least 1) measurements. It tells which cache the cores share, if any, and a virtual machine's
/// cores change it while a program runs. Infinity where the executor does not run its threads (at least 2) side by
/// side.
double round_trip_seconds(Executor& executor, int repeats);

}  // namespace bitcore::limits
