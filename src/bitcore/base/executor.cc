#include "bitcore/executor.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <string_view>
#include <system_error>

#include "bitcore/base/checks.h"
#include "bitcore/base/cpu_count.h"

namespace bitcore {
namespace {

constexpr const char* kVariable = "BITLAB_NUM_THREADS";

class SerialExecutor final : public Executor {
 public:
  int num_threads() const override { return 1; }
  void run(int count, const std::function<void(int)>& task) override {
    for (int i = 0; i < count; ++i) task(i);
  }
};

}  // namespace

int default_num_threads() {
  const char* variable = std::getenv(kVariable);
  if (variable == nullptr) return std::min(usable_cpus(), ThreadPool::kMostThreads);
  const std::string_view text = variable;
  int threads = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), threads);
  if (error != std::errc() || end != text.data() + text.size() || threads < 1 || threads > ThreadPool::kMostThreads) {
    fail(kVariable, " is '", text, "', expected a number from 1 to ", ThreadPool::kMostThreads);
  }
  return threads;
}

Executor& serial_executor() {
  static SerialExecutor executor;
  return executor;
}

Executor& default_executor() {
  // Never destroyed: other threads may compute while the process ends.
  static ThreadPool* const pool = new ThreadPool;
  return *pool;
}

}  // namespace bitcore
