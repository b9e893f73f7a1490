// The engine's kernels next to the limits of the machine, measured in one run.
//
//   build/benchmarks/bitcore_benchmark --benchmark_enable_random_interleaving=true --benchmark_repetitions=9
//
// Forward/<kernel>/<layout>/<rows of x>/<out_features>/<in_features>/<threads>: one call of bitlinear::forward,
// quantization and thread start included. Packed weights rotate over more than twice the last-level cache. GOPS = 2 M N
// K / time; GB/s counts packed weights. Limit/ReadMatrices/<layout>/<out_features>/<in_features>/<threads>/<streams>: a
// pure read of such matrices. Limit/<loop>/<threads> and Limit/ReadBandwidth/<threads>/<streams>: benchmarks/limits.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "benchmarks/limits/limits.h"
#include "bitcore/base/aligned_array.h"
#include "bitcore/executor.h"
#include "bitcore/kernels/int8_avxvnni_evex.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/ops/bitlinear.h"

namespace bitcore::benchmarks {
namespace {

constexpr std::int64_t kRotationBytes = std::int64_t{96} << 20;
constexpr std::pair<std::int64_t, std::int64_t> kShapes[] = {{2560, 2560}, {6912, 2560}, {2560, 6912}};

struct Case {
  std::string kernel;
  Layout layout;
  std::int64_t tokens, out_features, in_features;
  int threads;
};

struct MatrixRead {
  Layout layout;
  std::int64_t out_features, in_features;
  int threads, streams;
};

/// As many copies of a packed matrix as no cache holds, each on cache lines of its own.
class Rotation {
 public:
  explicit Rotation(std::span<const std::uint8_t> matrix)
      : size_(matrix.size()),
        stride_((size_ + kCacheLine - 1) / kCacheLine * kCacheLine),
        copies_(static_cast<std::size_t>(kRotationBytes) / stride_ + 1),
        memory_(static_cast<std::int64_t>(copies_ * stride_)) {
    for (std::size_t copy = 0; copy < copies_; ++copy) {
      std::copy(matrix.begin(), matrix.end(), memory_.data() + copy * stride_);
    }
  }
  std::span<const std::uint8_t> operator[](std::size_t turn) const {
    return {memory_.data() + turn % copies_ * stride_, size_};
  }

 private:
  std::size_t size_, stride_, copies_;
  AlignedArray<std::uint8_t> memory_;
};

std::vector<float> random_floats(std::int64_t count) {
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

void forward(benchmark::State& state, const Case& c) {
  const BitQuantConfig config{
      .activation_dtype = c.kernel.starts_with("Float32") ? ActivationDtype::float32 : ActivationDtype::int8,
      .activation_granularity = Granularity::per_channel};
  const std::vector<float> weight = random_floats(c.out_features * c.in_features);
  const bitlinear::PreparedWeights prepared =
      bitlinear::prepare_weights({weight.data(), c.out_features, c.in_features}, config, c.layout);
  const Rotation matrices(prepared.qweight);
  const std::vector<float> x = random_floats(c.tokens * c.in_features);
  AlignedArray<float> y(c.tokens * c.out_features);
  ThreadPool executor(c.threads);
  std::size_t turn = 0;
  for (auto _ : state) {
    const ConstMatrixView qweight(matrices[turn++].data(), c.out_features, prepared.shape.row_bytes());
    bitlinear::forward({x.data(), c.tokens, c.in_features}, prepared.scale, qweight, {}, config,
                       {y.data(), c.tokens, c.out_features}, {&executor, c.kernel});
  }
  const double operations = 2.0 * static_cast<double>(c.tokens * c.out_features * c.in_features);
  state.counters["GOPS"] = benchmark::Counter(operations * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(prepared.shape.bytes()) * 1e-9,
                                              benchmark::Counter::kIsIterationInvariantRate);
}

// On a pool, so that threads start as they do for the kernels.
void read_bandwidth(benchmark::State& state) {
  ThreadPool executor(static_cast<int>(state.range(0)));
  const std::vector<std::uint8_t> bytes(static_cast<std::size_t>(kRotationBytes), 1);
  const int streams = static_cast<int>(state.range(1));
  for (auto _ : state) benchmark::DoNotOptimize(limits::bytes_per_second(bytes, executor, streams, 1));
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(kRotationBytes) * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

// Packed matrices as forward reads them: one whole matrix at a time, by threads that start as they do for the kernels.
void read_matrices(benchmark::State& state, const MatrixRead& read) {
  const PackedShape shape = packed_shape(read.out_features, read.in_features, read.layout);
  const Rotation matrices(std::vector<std::uint8_t>(static_cast<std::size_t>(shape.bytes()), 1));
  ThreadPool executor(read.threads);
  std::size_t turn = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(limits::bytes_per_second(matrices[turn++], executor, read.streams, 1));
  }
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(shape.bytes()) * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void arithmetic(benchmark::State& state, const limits::MultiplyAdds& loop) {
  constexpr std::int64_t kRounds = 200'000;
  ThreadPool executor(static_cast<int>(state.range(0)));
  for (auto _ : state) benchmark::DoNotOptimize(limits::operations_per_second(loop, executor, kRounds));
  const auto operations = static_cast<double>(state.range(0) * kRounds * loop.operations);
  state.counters["GOPS"] = benchmark::Counter(1e-9 * operations, benchmark::Counter::kIsIterationInvariantRate);
}

void register_forward(const Case& c) {
  const std::string name = "Forward/" + c.kernel + "/" + std::string(to_string(c.layout)) + "/" +
                           std::to_string(c.tokens) + "/" + std::to_string(c.out_features) + "/" +
                           std::to_string(c.in_features) + "/" + std::to_string(c.threads);
  benchmark::RegisterBenchmark(name.c_str(), [c](benchmark::State& state) { forward(state, c); })->UseRealTime();
}

void register_read(const MatrixRead& read) {
  const std::string name = "Limit/ReadMatrices/" + std::string(to_string(read.layout)) + "/" +
                           std::to_string(read.out_features) + "/" + std::to_string(read.in_features) + "/" +
                           std::to_string(read.threads) + "/" + std::to_string(read.streams);
  benchmark::RegisterBenchmark(name.c_str(), [read](benchmark::State& state) {
    read_matrices(state, read);
  })->UseRealTime();
}

void register_all() {
  for (const int threads : {1, 2}) {
    for (const int streams : {1, 2, 4, 8}) {
      benchmark::RegisterBenchmark("Limit/ReadBandwidth", read_bandwidth)->Args({threads, streams})->UseRealTime();
      for (const Layout layout : kLayouts) {
        for (const auto& [out_features, in_features] : kShapes) {
          register_read({layout, out_features, in_features, threads, streams});
        }
      }
    }
    for (const limits::MultiplyAdds& loop : limits::multiply_adds()) {
      if (!loop.supported) continue;
      benchmark::RegisterBenchmark(("Limit/" + std::string(loop.name)).c_str(),
                                   [&loop](benchmark::State& state) { arithmetic(state, loop); })
          ->Arg(threads)
          ->UseRealTime();
    }
  }
#if defined(__x86_64__)
  KernelRegistry::register_kernel(make_int8_avxvnni_evex_kernel());
#endif
  for (const auto& kernel : KernelRegistry::all_kernels()) {
    if (!kernel->is_supported() || kernel->name() == "ReferenceKernel") continue;
    for (const Layout layout : kLayouts) {
      for (const int threads : {1, 2}) {
        for (const std::int64_t tokens : {1, 2, 4, 12, 32, 128, 512}) {
          for (const auto& [out_features, in_features] : kShapes) {
            register_forward({std::string(kernel->name()), layout, tokens, out_features, in_features, threads});
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace bitcore::benchmarks

int main(int argc, char** argv) {
  bitcore::benchmarks::register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
