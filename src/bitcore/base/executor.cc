// Threads for callers that bring none: OpenMP's where this file is compiled with it.
#include "bitcore/executor.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace bitcore {
namespace {

class SerialExecutor final : public Executor {
 public:
  int num_threads() const override { return 1; }
  void run(int count, const std::function<void(int)>& task) override {
    for (int i = 0; i < count; ++i) task(i);
  }
};

#ifdef _OPENMP
class OpenMpExecutor final : public Executor {
 public:
  int num_threads() const override { return omp_in_parallel() ? 1 : omp_get_max_threads(); }
  void run(int count, const std::function<void(int)>& task) override {
#pragma omp parallel for schedule(static, 1) num_threads(count < num_threads() ? count : num_threads()) if (count > 1)
    for (int i = 0; i < count; ++i) task(i);
  }
};
#endif

}  // namespace

Executor& serial_executor() {
  static SerialExecutor executor;
  return executor;
}

Executor& default_executor() {
#ifdef _OPENMP
  static OpenMpExecutor executor;
  return executor;
#else
  return serial_executor();
#endif
}

}  // namespace bitcore
