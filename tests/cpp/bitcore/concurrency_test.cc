// Many threads at once: forward on shared weights, on every kernel, while kernels come and go; and first uses that
// meet. ThreadSanitizer runs these (tests/builds).
#include <atomic>
#include <memory>

#include "bitcore/kernels/registry.h"
#include "bitcore/ops/bitlinear.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::bits_of;
using testing::Floats;
using testing::on_threads;
using testing::random_floats;

// Enough multiply-adds for forward to use both threads of a pool.
constexpr std::int64_t kTokens = 40, kOut = 130, kIn = 420;

struct Layer {
  BitQuantConfig config;
  Floats x = random_floats(kTokens * kIn, 1);
  Floats weight = random_floats(kOut * kIn, 2, 0.05f);
  Floats bias = random_floats(kOut, 3);
  bitlinear::PreparedWeights prepared;

  explicit Layer(const BitQuantConfig& layer_config)
      : config(layer_config), prepared(bitlinear::prepare_weights(weight_view(), config)) {}

  ConstMatrixView weight_view() const { return {weight.data(), kOut, kIn}; }

  Floats forward(std::string_view kernel, std::int64_t tokens, Executor& executor) const {
    Floats y(static_cast<std::size_t>(tokens * kOut));
    bitlinear::forward({x.data(), tokens, kIn}, prepared, {bias.data(), kOut}, config, {y.data(), tokens, kOut},
                       {&executor, kernel});
    return y;
  }
};

std::vector<std::string> kernels_for(const BitQuantConfig& config) {
  std::vector<std::string> names;
  for (const auto& kernel : KernelRegistry::all_kernels()) {
    if (kernel->is_supported() && kernel->is_compatible_with(config)) names.emplace_back(kernel->name());
  }
  return names;
}

// Computes nothing: it is there to be registered and removed.
class PassingKernel final : public BitKernelBase {
 public:
  explicit PassingKernel(std::string name) : name_(std::move(name)) {}
  std::string_view name() const override { return name_; }
  bool is_compatible_with(const BitQuantConfig&) const override { return false; }
  void operator()(const LinearArgs&) const override {}

 private:
  std::string name_;
};

// Each test runs in a process of its own under CTest, so that these are the first uses there.
TEST(Concurrency, FirstUsesMeet) {
  const Floats weight = random_floats(kOut * kIn, 2, 0.05f), x = random_floats(kIn, 1);
  std::vector<Floats> results(6, Floats(kOut));
  on_threads(6, [&](int i) {
    const auto prepared = bitlinear::prepare_weights({weight.data(), kOut, kIn}, {});
    bitlinear::forward({x.data(), 1, kIn}, prepared, {}, {}, {results[static_cast<std::size_t>(i)].data(), 1, kOut});
  });
  for (const Floats& y : results) EXPECT_EQ(bits_of(y), bits_of(results[0]));
}

TEST(Concurrency, EveryKernelOnSharedWeightsWhileKernelsComeAndGo) {
  ThreadPool two_threads(2);
  for (const ActivationDtype dtype : {ActivationDtype::int8, ActivationDtype::float32}) {
    const Layer layer({.activation_dtype = dtype, .activation_granularity = Granularity::per_channel});
    const std::vector<std::string> kernels = kernels_for(layer.config);
    std::vector<Floats> expected[2];  // for 1 and for kTokens rows of x
    for (const std::string& kernel : kernels) {
      expected[0].push_back(layer.forward(kernel, 1, serial_executor()));
      expected[1].push_back(layer.forward(kernel, kTokens, serial_executor()));
    }
    constexpr int kCallers = 4, kRegistrars = 2, kRounds = 6;
    std::atomic<int> callers_left{kCallers}, wrong{0}, registered{0};
    on_threads(kCallers + kRegistrars, [&](int thread) {
      if (thread >= kCallers) {
        const std::string name = "PassingKernel" + std::to_string(thread);
        while (callers_left > 0) {
          KernelRegistry::register_kernel(std::make_shared<PassingKernel>(name));
          KernelRegistry::list_available_kernels();
          KernelRegistry::unregister_kernel(name);
          ++registered;
        }
        return;
      }
      for (int round = 0; round < kRounds; ++round) {
        for (std::size_t i = 0; i < kernels.size(); ++i) {
          const std::size_t k = (i + static_cast<std::size_t>(thread)) % kernels.size();
          const int many = round % 2;
          const Floats y = layer.forward(kernels[k], many == 1 ? kTokens : 1, two_threads);
          wrong += bits_of(y) != bits_of(expected[many][k]);
        }
        KernelRegistry::get_kernel_for_config(layer.config);
      }
      --callers_left;
    });
    EXPECT_EQ(wrong, 0);
    EXPECT_GT(registered, 0);
  }
}

// A kernel that is removed while calls run on it lives until they return.
TEST(Concurrency, ARemovedKernelFinishesItsCalls) {
  class SlowKernel final : public BitKernelBase {
   public:
    explicit SlowKernel(std::atomic<bool>& alive) : alive_(alive) { alive_ = true; }
    ~SlowKernel() override { alive_ = false; }
    std::string_view name() const override { return "SlowKernel"; }
    bool is_compatible_with(const BitQuantConfig&) const override { return true; }
    void operator()(const LinearArgs& args) const override {
      running = true;
      while (!removed) std::this_thread::yield();
      reinterpret_cast<float*>(args.y.row(0))[0] = alive_ ? 1.0f : -1.0f;
    }
    mutable std::atomic<bool> running{false}, removed{false};

   private:
    std::atomic<bool>& alive_;
  };
  std::atomic<bool> alive{false};
  auto kernel = std::make_shared<SlowKernel>(alive);
  SlowKernel* raw = kernel.get();
  KernelRegistry::register_kernel(std::move(kernel));
  const Floats weight(3, 1.0f), x(3, 1.0f);
  const auto prepared = bitlinear::prepare_weights({weight.data(), 1, 3}, {});
  Floats y(1);
  std::thread caller([&] { bitlinear::forward({x.data(), 1, 3}, prepared, {}, {}, {y.data(), 1, 1}); });
  while (!raw->running) std::this_thread::yield();
  KernelRegistry::unregister_kernel("SlowKernel");
  EXPECT_TRUE(alive);
  raw->removed = true;
  caller.join();
  EXPECT_EQ(y[0], 1.0f);
  EXPECT_FALSE(alive);
}

// Training steps of several threads on one weight: forward_training and backward only read it.
TEST(Concurrency, TrainingStepsShareAWeight) {
  ThreadPool two_threads(2);
  const Layer layer({.activation_granularity = Granularity::per_channel});
  std::vector<Floats> gradients(4, Floats(kOut * kIn));
  on_threads(4, [&](int i) {
    Floats y(kTokens * kOut);
    const auto saved = bitlinear::forward_training({layer.x.data(), kTokens, kIn}, layer.weight_view(), {},
                                                   layer.config, {y.data(), kTokens, kOut}, {&two_threads, {}});
    bitlinear::backward({y.data(), kTokens, kOut}, saved, layer.config,
                        {.dx = {}, .dweight = {gradients[static_cast<std::size_t>(i)].data(), kOut, kIn}}, two_threads);
  });
  for (const Floats& dweight : gradients) EXPECT_EQ(dweight, gradients[0]);
}

}  // namespace
}  // namespace bitcore
