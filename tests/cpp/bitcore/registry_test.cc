// The registry as a user and as the author of a kernel sees it.
#include "bitcore/kernels/registry.h"

#include <algorithm>

#include "bitcore/ops/bitlinear.h"
#include "support.h"

namespace bitcore {
namespace {

using testing::expect_error;
using testing::Floats;

// Answers every call with 42.
class FortyTwoKernel final : public BitKernelBase {
 public:
  std::string_view name() const override { return "FortyTwoKernel"; }
  bool is_compatible_with(const BitQuantConfig& config) const override {
    return config.activation_dtype == ActivationDtype::int8;
  }
  void operator()(const LinearArgs& args) const override {
    for (std::int64_t m = 0; m < args.y.rows; ++m) {
      std::fill_n(reinterpret_cast<float*>(args.y.row(m)), args.y.cols, 42.0f);
    }
  }
};

TEST(Registry, EveryConfigHasAKernel) {
  for (const BitQuantConfig& config : all_configs()) {
    const auto kernel = KernelRegistry::get_kernel_for_config(config);
    EXPECT_TRUE(kernel->is_compatible_with(config));
    EXPECT_TRUE(kernel->is_supported());
    EXPECT_TRUE(kernel->name().starts_with(to_string(config.activation_dtype) == "int8" ? "Int8" : "Float32"));
  }
}

TEST(Registry, ListsWhatRunsHere) {
  const std::vector<std::string> names = KernelRegistry::list_available_kernels();
  for (const char* name :
       {"Int8Kernel", "Float32Kernel", "Int8PortableKernel", "Float32PortableKernel", "ReferenceKernel"}) {
    EXPECT_EQ(std::count(names.begin(), names.end(), name), 1) << name;
  }
}

// On an emulated lesser CPU as well: see CMakeLists.txt.
TEST(Registry, TheFirstThatRunsIsTheBest) {
#if defined(__x86_64__)
  const std::vector<std::string> int8 = {"Int8Avx512VbmiKernel", "Int8Avx512VnniKernel", "Int8AvxVnniKernel",
                                         "Int8Avx2Kernel", "Int8PortableKernel"};
  const std::vector<std::string> float32 = {"Float32Avx512Kernel", "Float32Avx2Kernel", "Float32PortableKernel"};
#else
  const std::vector<std::string> int8 = {"Int8NeonDotKernel", "Int8NeonKernel", "Int8PortableKernel"};
  const std::vector<std::string> float32 = {"Float32NeonKernel", "Float32PortableKernel"};
#endif
  const std::vector<std::string> available = KernelRegistry::list_available_kernels();
  for (const BitQuantConfig& config : all_configs()) {
    const auto& order = config.activation_dtype == ActivationDtype::int8 ? int8 : float32;
    const auto best = std::find_if(order.begin(), order.end(), [&](const std::string& name) {
      return std::count(available.begin(), available.end(), name) == 1;
    });
    ASSERT_NE(best, order.end());
    EXPECT_EQ(KernelRegistry::get_kernel_for_config(config)->name(), *best);
  }
}

TEST(Registry, FamilyNamesAreTheBestOfTheirFamily) {
  EXPECT_EQ(KernelRegistry::get_kernel_by_name("Int8Kernel", {}), KernelRegistry::get_kernel_for_config({}));
  const BitQuantConfig float32{.activation_dtype = ActivationDtype::float32};
  EXPECT_EQ(KernelRegistry::get_kernel_by_name("Float32Kernel", float32),
            KernelRegistry::get_kernel_for_config(float32));
}

TEST(Registry, Errors) {
  const BitQuantConfig float32{.activation_dtype = ActivationDtype::float32};
  expect_error<KernelNotFoundError>([] { KernelRegistry::get_kernel_by_name("NoKernel", {}); },
                                    {"NoKernel", "ReferenceKernel"});
  expect_error<KernelNotFoundError>([&] { KernelRegistry::get_kernel_by_name("Int8PortableKernel", float32); },
                                    {"Int8PortableKernel", "activation_dtype='float32'"});
  expect_error<KernelNotFoundError>([&] { KernelRegistry::get_kernel_by_name("Int8Kernel", float32); },
                                    {"Int8Kernel", "float32"});
  expect_error<KernelNotFoundError>([] { KernelRegistry::unregister_kernel("ReferenceKernel"); }, {"ReferenceKernel"});
}

TEST(Registry, NullIsNoKernel) {
  expect_error<BitLabError>([] { KernelRegistry::register_kernel(nullptr); }, {"null"});
}

TEST(Registry, UserKernelsComeFirst) {
  const auto builtin = KernelRegistry::get_kernel_for_config({});
  KernelRegistry::register_kernel(std::make_shared<FortyTwoKernel>());
  EXPECT_EQ(KernelRegistry::get_kernel_for_config({})->name(), "FortyTwoKernel");
  EXPECT_EQ(KernelRegistry::get_kernel_by_name("Int8Kernel", {}), builtin) << "the alias names built-in kernels";
  EXPECT_EQ(KernelRegistry::list_available_kernels().front(), "FortyTwoKernel");
  expect_error<BitLabError>([] { KernelRegistry::register_kernel(std::make_shared<FortyTwoKernel>()); },
                            {"FortyTwoKernel", "already"});

  const Floats weight(6, 1.0f), x(3, 1.0f);
  const auto prepared = bitlinear::prepare_weights({weight.data(), 2, 3}, {});
  Floats y(2);
  bitlinear::forward({x.data(), 1, 3}, prepared, {}, {}, {y.data(), 1, 2});
  EXPECT_EQ(y, (Floats{42.0f, 42.0f}));

  KernelRegistry::unregister_kernel("FortyTwoKernel");
  EXPECT_EQ(KernelRegistry::get_kernel_for_config({}), builtin);
}

}  // namespace
}  // namespace bitcore
