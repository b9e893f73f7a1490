// Records which kernels computed tiles in a test, as the test's property "kernels": --gtest_output=json shows it, and
// scripts/promises.py reads it.
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>

#include "bitcore/kernels/registry.h"

namespace bitcore {
namespace {

std::map<std::string, std::uint64_t> tile_calls() {
  std::map<std::string, std::uint64_t> calls;
  for (const auto& kernel : KernelRegistry::all_kernels()) calls.emplace(kernel->name(), kernel->tile_calls());
  return calls;
}

class RecordKernels final : public ::testing::EmptyTestEventListener {
  void OnTestStart(const ::testing::TestInfo&) override { before_ = tile_calls(); }

  void OnTestEnd(const ::testing::TestInfo&) override {
    std::string names;
    for (const auto& [name, calls] : tile_calls()) {
      if (calls != before_[name]) names += (names.empty() ? "" : " ") + name;
    }
    ::testing::Test::RecordProperty("kernels", names);
  }

  std::map<std::string, std::uint64_t> before_;
};

// The listeners own it.
[[maybe_unused]] const bool kListens = [] {
  ::testing::UnitTest::GetInstance()->listeners().Append(new RecordKernels);
  return true;
}();

}  // namespace
}  // namespace bitcore
