/// @file torch_executor.h
/// The engine on LibTorch's threads: it follows torch.set_num_threads and never oversubscribes.
///
/// Needs LibTorch 2.10 or newer, and its stable ABI only. (at::parallel_for is a template that runs serially in every
/// program compiled without -fopenmp.)
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <functional>

#include "bitcore/executor.h"

namespace bitcore {

/// Torch's own threads as an Executor.
class TorchExecutor final : public Executor {
 public:
  int num_threads() const override { return static_cast<int>(::torch::stable::get_num_threads()); }
  void run(int count, const std::function<void(int)>& task) override {
    ::torch::stable::parallel_for(0, count, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) task(static_cast<int>(i));
    });
  }
};

/// The one of the process.
inline Executor& torch_executor() {
  static TorchExecutor executor;
  return executor;
}

}  // namespace bitcore
