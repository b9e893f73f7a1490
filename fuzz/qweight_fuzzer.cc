// Any bytes as a packed weight of any shape. check_qweight, unpack_weights and forward on every kernel of this machine
// refuse them with a QuantizationError, or read them as the same ternary weights; with scales per group, too.
#include <bit>
#include <cmath>
#include <memory>

#include "bitcore/exceptions.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/ops/base.h"
#include "bitcore/ops/bitlinear.h"
#include "fuzz/support.h"
#include "layouts.h"

namespace bitcore::fuzz {
namespace {

// One input, read.
struct Case {
  std::int64_t out_features, in_features, tokens;
  BitQuantConfig config;
  std::unique_ptr<std::uint8_t[]> bytes;  // of exactly the weight's size: the sanitizer sees what is read behind it
  std::int64_t row_bytes;
  bool any_scales;  // those of groups are any float16, also ones that forward refuses

  ConstMatrixView qweight() const { return {bytes.get(), out_features, row_bytes}; }
};

// A weight of zeros, whose payload the input then replaces.
void write_payload(Case& c, Layout layout, std::span<const std::uint8_t> bytes, bool with_checksum) {
  const std::vector<std::int8_t> zeros(static_cast<std::size_t>(c.out_features * c.in_features));
  const std::vector<std::uint8_t> packed = pack_weights({zeros.data(), c.out_features, c.in_features}, layout);
  const auto payload = packed_shape(c.out_features, c.in_features, layout).payload_bytes();
  c.row_bytes = static_cast<std::int64_t>(packed.size()) / c.out_features;
  c.bytes = std::make_unique<std::uint8_t[]>(packed.size());
  std::copy(packed.begin(), packed.end(), c.bytes.get());
  if (!bytes.empty()) {
    for (std::int64_t i = 0; i < payload; ++i) c.bytes[i] = bytes[static_cast<std::size_t>(i) % bytes.size()];
  }
  const std::uint64_t checksum = payload_checksum(c.bytes.get(), payload);
  for (int i = 0; with_checksum && i < 8; ++i) {
    c.bytes[payload + 32 + i] = static_cast<std::uint8_t>(checksum >> (8 * i));
  }
}

Case read_case(std::span<const std::uint8_t> input) {
  Case c{};
  c.out_features = 1 + input[kOutFeatures] % kMostOutFeatures;
  c.in_features = 1 + input[kInFeatures] % kMostInFeatures;
  const std::uint8_t bits = input[kConfig];
  c.config.weight_granularity = bits & 1 ? Granularity::per_channel : Granularity::per_tensor;
  c.config.activation_dtype = bits & 2 ? ActivationDtype::float32 : ActivationDtype::int8;
  c.config.activation_granularity = bits & 4 ? Granularity::per_channel : Granularity::per_tensor;
  c.tokens = bits & 8 ? 20 : 1;  // both ways through the kernels: directly, and by panels
  if (bits & 16) {
    c.config.weight_granularity = Granularity::per_group;
    c.config.group_size = kGroupSizes[bits >> 5 & 3];
    if (bits & 1 && c.config.activation_dtype == ActivationDtype::int8) {
      c.config.activation_granularity = Granularity::per_group;
    }
  }
  c.any_scales = (bits & 128) != 0;
  const std::span<const std::uint8_t> bytes = input.subspan(kQweightFields);
  const auto mode = static_cast<QweightMode>(input[kMode] % kQweightModes);
  if (mode != raw) {
    const std::vector<Layout> layouts = testing::layouts_of(c.in_features);
    write_payload(c, layouts[input[kLayout] % layouts.size()], bytes, mode == valid_checksum);
  } else {
    c.row_bytes = static_cast<std::int64_t>(bytes.size()) / c.out_features;
    c.bytes = std::make_unique<std::uint8_t[]>(static_cast<std::size_t>(c.row_bytes * c.out_features));
    std::copy_n(bytes.begin(), c.row_bytes * c.out_features, c.bytes.get());
  }
  return c;
}

// The bits of y, or nothing where the kernel refuses. x holds small integers, so that float32 sums are exact as well.
std::vector<float> forward(const Case& c, ConstMatrixView qweight, std::string_view kernel) {
  std::vector<float> x(static_cast<std::size_t>(c.tokens * c.in_features));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 5 % 13) - 6.0f;
  const std::int64_t scales = weight_scale_size(c.out_features, c.in_features, c.config);
  const std::vector<float> floats(static_cast<std::size_t>(scales), 0.5f);
  std::vector<std::uint16_t> halves(floats.size(), 0x3800);  // 0.5
  for (std::size_t i = 0; c.any_scales && i < halves.size(); ++i) {
    halves[i] = static_cast<std::uint16_t>(0x1235 * i + 0x0107 * static_cast<std::size_t>(c.in_features));
  }
  const bool grouped = c.config.weight_granularity == Granularity::per_group;
  const ConstVectorView scale = grouped ? ConstVectorView(halves.data(), DType::float16, scales) : floats;
  std::vector<float> y(static_cast<std::size_t>(c.tokens * c.out_features));
  const bool refused = throws<QuantizationError>([&] {
    bitlinear::forward({x.data(), c.tokens, c.in_features}, scale, qweight, {}, c.config,
                       {y.data(), c.tokens, c.out_features}, {&serial_executor(), kernel});
  });
  if (refused) y.clear();
  return y;
}

const std::string& kernel_of(const BitQuantConfig& config, std::uint8_t index) {
  static const auto names = [] {
    std::vector<std::string> of_dtype[2];
    for (const auto& kernel : KernelRegistry::all_kernels()) {
      for (const ActivationDtype dtype : {ActivationDtype::float32, ActivationDtype::int8}) {
        if (kernel->is_supported() && kernel->is_compatible_with({.activation_dtype = dtype})) {
          of_dtype[dtype == ActivationDtype::int8].emplace_back(kernel->name());
        }
      }
    }
    return std::to_array(of_dtype);
  }();
  const std::vector<std::string>& fitting = names[config.activation_dtype == ActivationDtype::int8];
  return fitting[index % fitting.size()];
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float left, float right) {
    return std::bit_cast<std::uint32_t>(left) == std::bit_cast<std::uint32_t>(right);
  });
}

void check(const Case& c, std::uint8_t kernel) {
  const bool whole = !throws<QuantizationError>([&] { check_qweight(c.qweight(), c.in_features); });
  std::vector<std::int8_t> codes(static_cast<std::size_t>(c.out_features * c.in_features));
  const MatrixView unpacked(codes.data(), c.out_features, c.in_features);
  require(whole == !throws<QuantizationError>([&] { unpack_weights(c.qweight(), unpacked); }),
          "unpack_weights refuses what check_qweight refuses");

  const std::vector<float> y = forward(c, c.qweight(), kernel_of(c.config, kernel));
  require(!whole || !y.empty() || c.any_scales, "forward reads what check_qweight accepts");
  if (y.empty()) {
    require(forward(c, c.qweight(), "ReferenceKernel").empty(), "kernels refuse the same weights");
    return;
  }
  unpack_weights(c.qweight(), unpacked, Verify::trailer);
  for (const std::int8_t code : codes) require(code >= -1 && code <= 1, "what forward reads is ternary");
  require(same_bits(y, forward(c, unpacked, "ReferenceKernel")), "forward reads the weights that unpack_weights reads");
}

}  // namespace
}  // namespace bitcore::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bitcore::fuzz;
  if (size < kQweightFields) return -1;
  check(read_case({data, size}), data[kKernel]);
  return 0;
}
