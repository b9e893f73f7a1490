// A forward with a workspace allocates nothing; workspaces are checked; results do not depend on them.
#include "allocations.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::allocations;
using testing::bits_of;
using testing::expect_error;
using testing::Floats;
using testing::random_floats;

constexpr std::int64_t kOut = 70, kIn = 333;

struct Call {
  bitlinear::PreparedWeights weights;
  BitQuantConfig config;
  Floats bias = random_floats(kOut, 2);

  Call(const BitQuantConfig& c, Layout layout)
      : weights(bitlinear::prepare_weights({random_floats(kOut * kIn, 1).data(), kOut, kIn}, c, layout)), config(c) {}

  void operator()(const Floats& x, Floats& y, const bitlinear::Options& options) const {
    const auto rows = static_cast<std::int64_t>(x.size()) / kIn;
    bitlinear::forward({x.data(), rows, kIn}, weights, {bias.data(), kOut}, config, {y.data(), rows, kOut}, options);
  }
};

std::vector<std::string> kernels_with_workspace(const Call& call) {
  std::vector<std::string> names;
  for (const auto& kernel : KernelRegistry::all_kernels()) {
    if (kernel->is_supported() && kernel->is_compatible_with(call.config) &&
        kernel->workspace_size(1, call.weights.shape, call.config, 1) > 0) {
      names.emplace_back(kernel->name());
    }
  }
  return names;
}

TEST(Workspace, ForwardAllocatesNothing) {
  ThreadPool pool(2);
  pool.run(2, [](int) {});  // starts its threads
  for (const BitQuantConfig& config : testing::typical_configs()) {
    for (const Layout layout : kLayouts) {
      const Call call(config, layout);
      const std::vector<std::string> kernels = kernels_with_workspace(call);
      ASSERT_GE(kernels.size(), 1u);
      for (const std::string& kernel : kernels) {
        for (Executor* executor : {&serial_executor(), static_cast<Executor*>(&pool)}) {
          constexpr std::int64_t kMost = 130;
          bitlinear::Options options{executor, kernel};
          std::vector<std::byte> memory(bitlinear::workspace_size(kMost, call.weights.shape, config, options) + 1);
          for (const std::int64_t rows :
               {std::int64_t{0}, std::int64_t{1}, std::int64_t{7}, std::int64_t{13}, std::int64_t{65}, kMost}) {
            const Floats x = random_floats(rows * kIn, 3);
            Floats expected(static_cast<std::size_t>(rows * kOut)), y(expected.size());
            call(x, expected, {executor, kernel});
            options.workspace = std::span(memory).subspan(1);  // any alignment
            const std::int64_t before = allocations.load();
            call(x, y, options);
            EXPECT_EQ(allocations.load(), before) << kernel << " " << rows << " rows";
            EXPECT_EQ(bits_of(y), bits_of(expected)) << kernel << " " << rows << " rows";
          }
        }
      }
    }
  }
}

// Behind the workspace's end nothing is written: a canary of many cache lines.
TEST(Workspace, IsNotOverrun) {
  ThreadPool pool(2);
  for (const BitQuantConfig& config : testing::typical_configs()) {
    for (const Layout layout : kLayouts) {
      const Call call(config, layout);
      for (const std::string& kernel : kernels_with_workspace(call)) {
        for (const std::int64_t rows : {1, 2, 5, 12, 13, 25, 40, 130, 1100}) {
          bitlinear::Options options{&pool, kernel};
          const std::size_t size = bitlinear::workspace_size(rows, call.weights.shape, config, options);
          std::vector<std::byte> memory(size + 65536, std::byte{0x5a});
          options.workspace = std::span(memory).first(size);
          Floats y(static_cast<std::size_t>(rows * kOut));
          call(random_floats(rows * kIn, 3), y, options);
          EXPECT_TRUE(std::all_of(memory.begin() + static_cast<std::ptrdiff_t>(size), memory.end(),
                                  [](std::byte b) { return b == std::byte{0x5a}; }))
              << kernel << " " << rows << " rows";
        }
      }
    }
  }
}

TEST(Workspace, OneForMoreRowsServesFewer) {
  ThreadPool threads(2);
  for (const BitQuantConfig& config : testing::typical_configs()) {
    const Call call(config, Layout::two_bit);
    for (const std::string& kernel : kernels_with_workspace(call)) {
      const bitlinear::Options options{&threads, kernel};
      std::size_t last = 0;
      for (std::int64_t rows = 0; rows <= 3000; rows += rows < 40 ? 1 : 97) {
        const std::size_t size = bitlinear::workspace_size(rows, call.weights.shape, config, options);
        EXPECT_GE(size, last) << kernel << " " << rows << " rows";
        last = size;
      }
    }
  }
}

TEST(Workspace, TooSmallAndWrongSizes) {
  const BitQuantConfig config;
  const Call call(config, Layout::two_bit);
  const std::size_t needed = bitlinear::workspace_size(40, call.weights.shape, config);
  std::vector<std::byte> memory(needed - 1);
  Floats x = random_floats(40 * kIn, 3), y(40 * kOut);
  bitlinear::Options options;
  options.workspace = memory;
  expect_error<QuantizationError>([&] { call(x, y, options); },
                                  {"workspace", std::to_string(needed - 1), std::to_string(needed)});
  expect_error<QuantizationError>([&] { bitlinear::workspace_size(-1, call.weights.shape, config); }, {"rows", "-1"});
  expect_error<QuantizationError>([&] { bitlinear::workspace_size(1, PackedShape{}, config); }, {"out_features", "0"});
  expect_error<KernelNotFoundError>(
      [&] {
        bitlinear::workspace_size(1, call.weights.shape, config, {nullptr, "NoSuchKernel"});
      },
      {"NoSuchKernel"});
}

TEST(Workspace, KernelsWithoutOneSayZero) {
  const BitQuantConfig config;
  const Call call(config, Layout::two_bit);
  EXPECT_EQ(bitlinear::workspace_size(4, call.weights.shape, config, {nullptr, "ReferenceKernel"}), 0u);
}

}  // namespace
}  // namespace bitcore
