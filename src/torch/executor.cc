#include "executor.h"

#include <torch/csrc/stable/ops.h>

namespace bitcore::torch_ops {
namespace {

class TorchExecutor final : public Executor {
 public:
  int num_threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int count, const std::function<void(int)>& task) override {
    torch::stable::parallel_for(0, count, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) task(static_cast<int>(i));
    });
  }
};

}  // namespace

Executor& torch_executor() {
  static TorchExecutor executor;
  return executor;
}

}  // namespace bitcore::torch_ops
