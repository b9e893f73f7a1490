#include "kernels/tiled_kernel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "aligned_array.h"
#include "bitcore/ops/base.h"
#include "checks.h"
#include "math.h"
#include "ops/packing_internal.h"
#include "quantize-inl.h"

namespace bitcore {
namespace {

// Below this many multiply-adds a thread costs more to start than it saves: a fork and join takes a few microseconds,
// in which one core does about a million.
constexpr std::int64_t kMacsPerThread = std::int64_t{1} << 20;

// Activations that are quantized, packed and multiplied before the next ones: they stay in the last-level cache.
constexpr std::int64_t kActivationBlockBytes = std::int64_t{4} << 20;

// One call: the arguments with everything that is derived from them once.
class Run {
 public:
  Run(const TileFunctions& functions, const LinearArgs& args)
      : f_(functions),
        args_(args),
        tokens_(args.x.rows),
        in_features_(args.x.cols),
        out_features_(args.y.cols),
        k_padded_(round_up(in_features_, kStepCodes)),
        payload_row_bytes_(packed_shape(out_features_, in_features_).payload_row_bytes),
        payload_(static_cast<const std::uint8_t*>(args.qweight.data)),
        x_element_(functions.activation_dtype == ActivationDtype::int8 ? 1 : 4),
        w_scale_(round_up(out_features_, 16)),
        bias_(args.bias ? round_up(out_features_, 16) : 0) {
    std::fill_n(w_scale_.data(), out_features_, args.qweight_scale[0]);
    if (args.qweight_scale.size() > 1) std::copy(args.qweight_scale.begin(), args.qweight_scale.end(), w_scale_.data());
    if (args.bias) widen(args.bias.data, args.bias.dtype, out_features_, bias_.data());
    if (args.config.activation_granularity == Granularity::per_tensor) set_tensor_scale();
  }

  /// Returns the number of tile calls.
  std::uint64_t run() {
    if (tokens_ <= f_.direct_tokens) {
      run_direct();
    } else {
      run_blocks();
    }
    if (invalid_.load(std::memory_order_relaxed) != 0) fail_invalid_code();
    return tile_calls_.load(std::memory_order_relaxed);
  }

 private:
  bool has_codes() const { return !args_.x_scale.empty(); }

  // int8, per tensor: one scale for all rows, which must be known before the first is quantized.
  void set_tensor_scale() {
    if (f_.activation_dtype != ActivationDtype::int8) return;
    tensor_scale_ = has_codes() ? args_.x_scale[0] : 0.0f;
    if (!has_codes()) compute_x_scale(args_.x, args_.config, std::span(&tensor_scale_, 1), *args_.executor);
  }

  bool per_tensor() const { return args_.config.activation_granularity == Granularity::per_tensor; }

  // Row `token` of x as float32, in place where it is already.
  const float* float_row(std::int64_t token, float* buffer) const {
    if (args_.x.dtype == DType::float32) return reinterpret_cast<const float*>(args_.x.row(token));
    widen(args_.x.row(token), args_.x.dtype, in_features_, buffer);
    return buffer;
  }

  struct Activation {
    float scale;
    std::int32_t sum;  // of the codes
  };

  // Writes one row of activations, zero padded, as the tile functions read it.
  Activation prepare_row(std::int64_t token, float* buffer, std::byte* out) const {
    std::memset(out + in_features_ * x_element_, 0, static_cast<std::size_t>((k_padded_ - in_features_) * x_element_));
    if (has_codes()) return copy_codes(token, reinterpret_cast<std::int8_t*>(out));
    const float* x = float_row(token, buffer);
    if (f_.activation_dtype == ActivationDtype::float32) {
      std::memcpy(out, x, static_cast<std::size_t>(in_features_) * sizeof(float));
      const bool finite = f_.absmax(x, in_features_) < kInfinityBits;
      return {finite ? 1.0f : quiet_nan(), 0};
    }
    const float scale = per_tensor() ? tensor_scale_ : x_scale_of(f_.absmax(x, in_features_));
    return {scale, f_.quantize(x, in_features_, scale, reinterpret_cast<std::int8_t*>(out))};
  }

  Activation copy_codes(std::int64_t token, std::int8_t* out) const {
    const auto* codes = reinterpret_cast<const std::int8_t*>(args_.x.row(token));
    std::memcpy(out, codes, static_cast<std::size_t>(in_features_));
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < in_features_; ++k) sum += codes[k];
    return {per_tensor() ? tensor_scale_ : args_.x_scale[static_cast<std::size_t>(token)], sum};
  }

  // What the sums of a token start from. The bits of int32 and float zero are the same.
  void start_sums(std::int32_t* sums, std::int64_t count, std::int32_t activation_sum) const {
    std::fill_n(sums, count, f_.offset_codes ? -activation_sum : 0);
  }

  void store(const std::int32_t* sums, std::int64_t token, std::int64_t row, std::int64_t rows, float x_scale) const {
    std::byte* y = args_.y.row(token) + static_cast<std::size_t>(row) * size_of(args_.y.dtype);
    f_.store(sums, rows, x_scale, w_scale_.data() + row, args_.bias ? bias_.data() + row : nullptr, y, args_.y.dtype);
  }

  int thread_count(std::int64_t units) const {
    const std::int64_t macs = tokens_ * in_features_ * out_features_;
    return static_cast<int>(std::max<std::int64_t>(
        1, std::min({units, std::int64_t{args_.executor->num_threads()}, macs / kMacsPerThread})));
  }

  // Runs work(unit, scratch) for every unit; threads take the next free one, so that a slow core delays nobody.
  template <class MakeScratch, class Work>
  void for_each_unit(std::int64_t units, const MakeScratch& make_scratch, const Work& work) {
    const int threads = thread_count(units);
    std::atomic<std::int64_t> next{0};
    const auto task = [&](int) {
      auto scratch = make_scratch();
      std::uint32_t invalid = 0;
      for (std::int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
        invalid |= work(unit, scratch);
      }
      if (invalid != 0) invalid_.fetch_or(invalid, std::memory_order_relaxed);
    };
    if (threads == 1) {
      task(0);
    } else {
      args_.executor->run(threads, task);
    }
  }

  // Few tokens: every tile of packed weights is read once and multiplied with all of them.
  void run_direct() {
    const std::int64_t stride = k_padded_ * x_element_;
    AlignedArray<std::byte> rows(tokens_ * stride);
    AlignedArray<std::byte> packed(tokens_ * k_padded_ * f_.token_element);
    AlignedArray<float> buffer(args_.x.dtype == DType::float32 ? 0 : in_features_);
    std::vector<Activation> activations(static_cast<std::size_t>(tokens_));
    for (std::int64_t m = 0; m < tokens_; ++m) {
      activations[static_cast<std::size_t>(m)] = prepare_row(m, buffer.data(), rows.data() + m * stride);
    }
    f_.pack_tokens(rows.data(), stride, tokens_, k_padded_, packed.data());
    const std::int64_t tiles = ceil_div(out_features_, kTileRows);
    // A unit is a run of adjacent tiles: long sequential reads are what memory serves best.
    const std::int64_t unit_tiles =
        std::max<std::int64_t>(1, tiles / (8 * std::int64_t{args_.executor->num_threads()}));
    const auto no_scratch = [] { return 0; };
    for_each_unit(ceil_div(tiles, unit_tiles), no_scratch, [&](std::int64_t unit, int) {
      const std::int64_t last = std::min(tiles, (unit + 1) * unit_tiles);
      std::uint32_t invalid = 0;
      for (std::int64_t tile = unit * unit_tiles; tile < last; ++tile) {
        invalid |= direct_tile(tile, packed.data(), activations);
      }
      tile_calls_.fetch_add(static_cast<std::uint64_t>(last - unit * unit_tiles), std::memory_order_relaxed);
      return invalid;
    });
  }

  std::uint32_t direct_tile(std::int64_t tile, const std::byte* packed,
                            const std::vector<Activation>& activations) const {
    alignas(kCacheLine) std::int32_t sums[kMostDirectTokens * kTileRows];
    const std::int64_t row = tile * kTileRows;
    const std::int64_t rows = std::min(kTileRows, out_features_ - row);
    for (std::int64_t m = 0; m < tokens_; ++m) {
      start_sums(sums + m * kTileRows, kTileRows, activations[static_cast<std::size_t>(m)].sum);
    }
    const std::uint32_t invalid =
        f_.direct(payload_ + row * payload_row_bytes_, rows, k_padded_ / kStepCodes, packed, tokens_, sums);
    for (std::int64_t m = 0; m < tokens_; ++m) {
      store(sums + m * kTileRows, m, row, rows, activations[static_cast<std::size_t>(m)].scale);
    }
    return invalid;
  }

  // Many tokens: blocks of them are packed, then multiplied panel by panel.
  void run_blocks() {
    const std::int64_t token_bytes = k_padded_ * f_.token_element;
    const std::int64_t fitting = std::max<std::int64_t>(1, kActivationBlockBytes / token_bytes / f_.token_tile);
    const std::int64_t block = std::min(round_up(tokens_, f_.token_tile), fitting * f_.token_tile);
    AlignedArray<std::byte> packed(block * token_bytes);
    std::vector<Activation> activations(static_cast<std::size_t>(block));
    for (std::int64_t begin = 0; begin < tokens_; begin += block) {
      const std::int64_t count = std::min(block, tokens_ - begin);
      pack_block(begin, count, packed.data(), activations);
      multiply_block(begin, count, packed.data(), activations);
    }
  }

  struct PackScratch {
    AlignedArray<float> buffer;
    AlignedArray<std::byte> rows;
  };

  void pack_block(std::int64_t begin, std::int64_t count, std::byte* packed, std::vector<Activation>& activations) {
    const std::int64_t stride = k_padded_ * x_element_;
    const auto make_scratch = [&] {
      return PackScratch{AlignedArray<float>(args_.x.dtype == DType::float32 ? 0 : in_features_),
                         AlignedArray<std::byte>(f_.token_tile * stride)};
    };
    for_each_unit(ceil_div(count, f_.token_tile), make_scratch, [&](std::int64_t unit, PackScratch& scratch) {
      const std::int64_t first = unit * f_.token_tile;
      const std::int64_t tokens = std::min(f_.token_tile, count - first);
      for (std::int64_t m = 0; m < tokens; ++m) {
        activations[static_cast<std::size_t>(first + m)] =
            prepare_row(begin + first + m, scratch.buffer.data(), scratch.rows.data() + m * stride);
      }
      for (std::int64_t k = 0; k < k_padded_; k += f_.k_block) {
        const std::int64_t k_count = std::min(f_.k_block, k_padded_ - k);
        f_.pack_tokens(scratch.rows.data() + k * x_element_, stride, tokens, k_count,
                       packed + (first * k_padded_ + tokens * k) * f_.token_element);
      }
      return std::uint32_t{0};
    });
  }

  struct PanelScratch {
    AlignedArray<std::byte> panel;
    AlignedArray<std::int32_t> sums;
  };

  void multiply_block(std::int64_t begin, std::int64_t count, const std::byte* packed,
                      const std::vector<Activation>& activations) {
    const std::int64_t panels = ceil_div(out_features_, f_.panel_rows);
    // Where there are fewer panels than threads could take, the tokens are split as well.
    const std::int64_t token_tiles = ceil_div(count, f_.token_tile);
    const std::int64_t wanted = 4 * std::int64_t{args_.executor->num_threads()};
    const std::int64_t splits = std::clamp<std::int64_t>(ceil_div(wanted, panels), 1, token_tiles);
    const std::int64_t split_tokens = ceil_div(token_tiles, splits) * f_.token_tile;
    const auto make_scratch = [&] {
      return PanelScratch{
          AlignedArray<std::byte>(std::min(f_.k_block, k_padded_) * f_.panel_rows * f_.panel_element),
          AlignedArray<std::int32_t>(std::min(split_tokens, round_up(count, f_.token_tile)) * f_.panel_rows)};
    };
    for_each_unit(panels * splits, make_scratch, [&](std::int64_t unit, PanelScratch& scratch) {
      const std::int64_t first = (unit % splits) * split_tokens;
      const std::int64_t last = std::min(count, first + split_tokens);
      if (first >= last) return std::uint32_t{0};
      return multiply_panel(unit / splits, begin, first, last, packed, activations, scratch);
    });
  }

  // Tokens [first, last) of the block that begins at token `begin`, times one panel of output rows.
  std::uint32_t multiply_panel(std::int64_t panel, std::int64_t begin, std::int64_t first, std::int64_t last,
                               const std::byte* packed, const std::vector<Activation>& activations,
                               PanelScratch& scratch) {
    const std::int64_t row = panel * f_.panel_rows;
    const std::int64_t rows = std::min(f_.panel_rows, out_features_ - row);
    const auto sums_of = [&](std::int64_t m) { return scratch.sums.data() + (m - first) * f_.panel_rows; };
    for (std::int64_t m = first; m < last; ++m) {
      start_sums(sums_of(m), f_.panel_rows, activations[static_cast<std::size_t>(m)].sum);
    }
    std::uint32_t invalid = 0;
    for (std::int64_t k = 0; k < k_padded_; k += f_.k_block) {
      const std::int64_t k_count = std::min(f_.k_block, k_padded_ - k);
      invalid |= f_.unpack_panel(payload_ + row * payload_row_bytes_, payload_row_bytes_, rows, k / kStepCodes,
                                 (k + k_count) / kStepCodes, scratch.panel.data());
      for (std::int64_t m = first; m < last; m += f_.token_tile) {
        const std::int64_t tokens = std::min(f_.token_tile, last - m);
        f_.gemm(scratch.panel.data(), packed + (m * k_padded_ + tokens * k) * f_.token_element, tokens, k_count,
                sums_of(m));
        tile_calls_.fetch_add(1, std::memory_order_relaxed);
      }
    }
    for (std::int64_t m = first; m < last; ++m) {
      store(sums_of(m), begin + m, row, rows, activations[static_cast<std::size_t>(m)].scale);
    }
    return invalid;
  }

  const TileFunctions& f_;
  const LinearArgs& args_;
  const std::int64_t tokens_;
  const std::int64_t in_features_;
  const std::int64_t out_features_;
  const std::int64_t k_padded_;
  const std::int64_t payload_row_bytes_;
  const std::uint8_t* const payload_;
  const std::int64_t x_element_;  // bytes of an activation in row-major form
  AlignedArray<float> w_scale_;   // one for each output row
  AlignedArray<float> bias_;
  float tensor_scale_ = 0.0f;
  std::atomic<std::uint32_t> invalid_{0};
  std::atomic<std::uint64_t> tile_calls_{0};
};

}  // namespace

void TiledKernel::operator()(const LinearArgs& args) const {
  if (args.x.rows == 0) return;
  count_tiles(Run(functions_, args).run());
}

}  // namespace bitcore
