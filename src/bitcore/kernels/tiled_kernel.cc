#include "bitcore/kernels/tiled_kernel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>

#include "bitcore/base/aligned_array.h"
#include "bitcore/base/arena.h"
#include "bitcore/base/checks.h"
#include "bitcore/base/math.h"
#include "bitcore/base/parallel.h"
#include "bitcore/base/scales.h"
#include "bitcore/kernels/base3_recode-inl.h"
#include "bitcore/ops/base.h"
#include "bitcore/packing/packing_internal.h"
#include "bitcore/quantize/quantize-inl.h"
#include "bitcore/quantize/row_functions.h"

namespace bitcore {
namespace {

// Below this many multiply-adds a thread costs more to start than it saves: a fork and join takes a few microseconds,
// in which one core does about a million.
constexpr std::int64_t kMacsPerThread = std::int64_t{1} << 20;

// Multiply-adds of a unit that another thread takes from one that is late: no more than 50 us.
constexpr std::int64_t kMacsPerUnit = std::int64_t{1} << 21;

// Activations that are quantized, packed and multiplied before the next ones: they stay in the last-level cache.
constexpr std::int64_t kActivationBlockBytes = std::int64_t{4} << 20;

// Sums of a panel, which stay in the second-level cache between two blocks of k.
constexpr std::int64_t kPanelSumBytes = std::int64_t{128} << 10;

// Packed weights that are multiplied as they are, which stay in the second-level cache for all tokens.
constexpr std::int64_t kPanelWeightBytes = std::int64_t{64} << 10;

// A block of k ends at a step of either layout.
constexpr std::int64_t kBlockCodes = 80;

// Workspaces of up to this size come from the stack: small layers never allocate.
constexpr std::size_t kStackBytes = 8192;

// Sums of packed weights that are kept before they are stored together: while outputs are written, nothing is read.
constexpr std::int64_t kKeptSums = 4096;
static_assert(kKeptSums >= kMostDirectTokens * kTileRows);

// Rows that are stored together at most.
constexpr std::int64_t kMostStoredRows = kKeptSums / kMostStreams;

// Scales per group that are fetched ahead.
constexpr std::int64_t kPrefetchedScaleBytes = std::int64_t{8} << 10;

// Lanes of store.
constexpr std::int64_t kLanes = 16;

// How one call is cut into pieces: a function of its sizes alone.
struct Plan {
  Plan(const TileFunctions& f, std::int64_t tokens, const PackedShape& shape, const BitQuantConfig& config, int threads)
      : macs(tokens * shape.in_features * shape.out_features),
        grouped(config.weight_granularity == Granularity::per_group) {
    choose_way(f, tokens, shape.layout);
    measure_rows(f, shape);
    group_k = grouped ? config.group_size : k_padded;
    groups = ceil_div(k_padded, group_k);
    size_k_block(f, shape.layout);
    most_threads = static_cast<int>(std::clamp<std::int64_t>(macs / kMacsPerThread, 1, std::max(1, threads)));
    size_token_block(f, tokens);
    split_work(f, tokens, shape);
  }

  // Panels are of equal size, up to one unit, so that threads finish together.
  std::int64_t first_row(std::int64_t panel) const { return panel * units / panels * panel_unit; }

  std::int64_t macs;  // multiply-adds of the call
  bool grouped;       // weights have scales per group

  // ---- the way: few tokens times packed weights, many times unpacked panels ----
  bool direct;              // packed weights are multiplied as they are
  bool recode;              // 1.6-bit tiles are rewritten at 2 bits
  std::int64_t token_tile;  // most rows of x that are multiplied together
  std::int64_t panel_unit;  // output rows that the kernel computes together

  // ---- activations ----
  std::int64_t x_element;  // bytes of an activation in row-major form
  std::int64_t k_padded;
  std::int64_t row_bytes;    // of a row of activations in row-major form
  std::int64_t token_bytes;  // of a row of packed activations
  std::int64_t group_k;      // k that share a scale
  std::int64_t groups;       // of a row, with its padding
  std::int64_t k_block;
  std::int64_t block_tokens;  // packed and multiplied before the next ones

  // ---- threads ----
  int most_threads;
  bool own_x;  // each thread packs the one tile of tokens for itself: one alone would take as long
  std::int64_t units;
  bool whole_runs;      // a thread takes all of its panels together, unless another has begun with them
  std::int64_t panels;  // of some units each, which are multiplied with all tokens of a block before the next ones
  std::int64_t splits;  // of the tokens of a block
  bool keeps_scales;    // scales per group of a whole panel are copied for all of its tiles of tokens

 private:
  void choose_way(const TileFunctions& f, std::int64_t tokens, Layout layout) {
    direct = f.panels.gemm == nullptr || tokens <= f.direct_tokens;
    token_tile = direct ? f.direct_tokens : f.panels.token_tile;
    panel_unit = direct ? kTileRows : f.panels.rows;
    const LayoutFunctions& functions = f.layout(layout);
    const bool reads_it = direct ? functions.direct != nullptr && !grouped : functions.unpack_panel != nullptr;
    recode = layout == Layout::base3 && !reads_it;
  }

  void measure_rows(const TileFunctions& f, const PackedShape& shape) {
    x_element = f.activation_dtype == ActivationDtype::int8 ? 1 : 4;
    k_padded = round_up(shape.padded_in_features(), recode ? kStepCodes : 4);
    row_bytes = round_up(k_padded * x_element, 64);
    token_bytes = k_padded * f.token_element;
  }

  // Blocks of equal size, up to one step of the layout, or to one group.
  void size_k_block(const TileFunctions& f, Layout layout) {
    k_block = k_padded;
    if (direct) return;
    const std::int64_t unit = std::lcm(layout == Layout::base3 ? kBlockCodes : kStepCodes, grouped ? group_k : 1);
    const std::int64_t most = std::max(unit, f.panels.k_block / unit * unit);
    k_block = round_up(ceil_div(k_padded, ceil_div(k_padded, most)), unit);
  }

  void size_token_block(const TileFunctions& f, std::int64_t tokens) {
    std::int64_t fitting = kActivationBlockBytes / token_bytes;
    if (!direct) fitting = std::min(fitting, kPanelSumBytes / (4 * f.panels.rows));
    block_tokens = std::min(tokens, round_up(std::max(fitting, kMostDirectTokens), token_tile));
  }

  void split_work(const TileFunctions& f, std::int64_t tokens, const PackedShape& shape) {
    const bool one_tile = tokens <= token_tile;
    own_x = most_threads > 1 && one_tile && f.activation_dtype == ActivationDtype::int8;
    units = ceil_div(shape.out_features, panel_unit);
    whole_runs = direct && !recode && one_tile && most_threads > 1;
    panels = direct ? direct_panels(one_tile, shape) : units;
    // Where there are fewer panels than threads could take, the tokens are split as well.
    const std::int64_t wanted = most_threads > 1 ? 4 * std::int64_t{most_threads} : 1;
    splits = std::clamp<std::int64_t>(ceil_div(wanted, panels), 1, ceil_div(block_tokens, token_tile));
    keeps_scales = grouped && direct && !one_tile;
  }

  // A panel is a run of adjacent rows: every start of a run costs a microsecond, in which memory does not yet know what
  // comes. A thread multiplies all panels of its own together with one tile of tokens; several tiles of tokens find the
  // weights in the second-level cache; a rewritten tile serves all tokens.
  std::int64_t direct_panels(bool one_tile, const PackedShape& shape) const {
    if (recode) return units;
    std::int64_t least = most_threads;
    if (whole_runs) {
      least = round_up(ceil_div(macs, kMacsPerUnit), most_threads);
    } else if (!one_tile) {
      const std::int64_t fitting =
          std::max<std::int64_t>(1, kPanelWeightBytes / (panel_unit * shape.payload_row_bytes));
      least = std::max(least, round_up(ceil_div(units, fitting), most_threads));
    }
    return std::min(units, least);
  }
};

// The first unit of a thread's run that no thread has taken yet.
struct alignas(kCacheLine) NextUnit {
  explicit NextUnit(std::int64_t first) : unit(first) {}
  std::atomic<std::int64_t> unit;
};

// A block of tokens as the tile functions read it.
struct PackedTokens {
  Activation* activations;  // of one tile of tokens after the other, [group][token]
  std::byte* codes;
};

// Scratch memory of a call, shared by its threads or one for each of them.
struct Buffers {
  struct Thread {
    PackedTokens x;   // with Plan::own_x of this thread, otherwise of all
    bool has_x;       // with Plan::own_x: it is packed
    float* floats;    // a row of x, widened
    std::byte* rows;  // rows of activations, row-major
    std::uint8_t* recoded;
    float* group_scales;  // Groups::w_scale
    std::byte* panel;
    std::int32_t* sums;
  };

  Buffers(const TileFunctions& f, const Plan& plan, const PackedShape& shape, Arena& arena) {
    const std::int64_t padded_rows = round_up(shape.out_features, kLanes);
    w_scale = arena.take<float>(plan.grouped ? 0 : padded_rows);
    bias = arena.take<float>(padded_rows);
    next = arena.take<NextUnit>(plan.most_threads);
    if (!plan.own_x) x = take_x(plan, arena);
    first = arena.position();
    take(f, plan, arena);
    per_thread = arena.position() - first;
    arena.skip(per_thread * (plan.most_threads - 1));
  }

  // The buffers of one thread.
  Thread thread(const TileFunctions& f, const Plan& plan, Arena arena, int index) const {
    arena.skip(first + per_thread * index - arena.position());
    return take(f, plan, arena);
  }

  float* w_scale;
  float* bias;
  NextUnit* next;

 private:
  static PackedTokens take_x(const Plan& plan, Arena& arena) {
    PackedTokens taken{};
    taken.activations = arena.take<Activation>(plan.block_tokens * plan.groups);
    taken.codes = arena.take<std::byte>(plan.block_tokens * plan.token_bytes);
    return taken;
  }

  Thread take(const TileFunctions& f, const Plan& plan, Arena& arena) const {
    Thread thread{};
    thread.x = plan.own_x ? take_x(plan, arena) : x;
    thread.floats = arena.take<float>(plan.k_padded);
    thread.rows = arena.take<std::byte>(std::min(plan.token_tile, plan.block_tokens) * plan.row_bytes);
    // A vector load of the last step reads on, as it does into the trailer of a packed weight.
    if (plan.recode) thread.recoded = arena.take<std::uint8_t>(plan.panel_unit * plan.k_block / 4 + kTrailerBytes);
    if (plan.grouped) {
      std::int64_t rows = plan.direct ? kMostStreams * kTileRows : f.panels.rows;
      if (plan.keeps_scales) rows = std::max(rows, ceil_div(plan.units, plan.panels) * kTileRows);
      thread.group_scales = arena.take<float>(ceil_div(plan.k_block, plan.group_k) * rows);
    }
    if (plan.direct) return thread;
    thread.panel = arena.take<std::byte>(plan.k_block * f.panels.rows * f.panels.element);
    thread.sums = arena.take<std::int32_t>(plan.block_tokens * f.panels.rows);
    return thread;
  }

  PackedTokens x{};
  std::int64_t first;
  std::int64_t per_thread;
};

// One call: the arguments with everything that is derived from them once.
class Run {
 public:
  Run(const TileFunctions& functions, const LinearArgs& args, const PackedShape& shape, const Plan& plan, Arena arena)
      : f_(functions),
        args_(args),
        shape_(shape),
        plan_(plan),
        arena_(arena),
        buffers_(functions, plan, shape, arena),
        tokens_(args.x.rows),
        in_features_(args.x.cols),
        one_scale_(args.qweight_scale.size == 1),
        w_scale_(buffers_.w_scale),
        payload_(static_cast<const std::uint8_t*>(args.qweight.data)) {
    // Registers of outputs read on after the last row: what the caller's arrays lack there is copied. What is not
    // copied has not to be fetched either: a call that streams weights finds little of the last one in the cache.
    const std::int64_t rows = shape.out_features, padded = round_up(rows, kLanes);
    const auto* scale = static_cast<const float*>(args.qweight_scale.data);
    if (plan.grouped) {
      w_scale_ = nullptr;
    } else if (one_scale_) {
      std::fill_n(buffers_.w_scale, std::min(padded, kMostStoredRows), scale[0]);
    } else if (rows == padded) {
      w_scale_ = scale;
    } else {
      std::copy_n(scale, rows, buffers_.w_scale);
      std::fill(buffers_.w_scale + rows, buffers_.w_scale + padded, 0.0f);
    }
    if (args.bias && args.bias.dtype == DType::float32 && rows == padded) {
      bias_ = reinterpret_cast<const float*>(args.bias.data);
    } else if (args.bias) {
      widen(args.bias.data, args.bias.dtype, rows, buffers_.bias);
      std::fill(buffers_.bias + rows, buffers_.bias + padded, 0.0f);
      bias_ = buffers_.bias;
    }
  }

  /// Returns the number of tile calls.
  std::uint64_t run() {
    if (is_int8() && per_tensor()) set_tensor_scale();
    for (std::int64_t begin = 0; begin < tokens_; begin += plan_.block_tokens) {
      const std::int64_t count = std::min(plan_.block_tokens, tokens_ - begin);
      if (!plan_.own_x) pack_block(begin, count);
      multiply_block(begin, count);
    }
    if (invalid_.load(std::memory_order_relaxed) != 0) fail_invalid_code();
    if (args_.check_scales && unusable_.load(std::memory_order_relaxed)) fail_unusable_scale(args_.qweight_scale);
    return tile_calls_.load(std::memory_order_relaxed);
  }

 private:
  using Thread = Buffers::Thread;

  // Tiles [begin, end) of the block of `count` tokens that begins at token `block`.
  struct TokenTiles {
    std::int64_t block, count;
    std::int64_t begin, end;
  };

  bool is_int8() const { return f_.activation_dtype == ActivationDtype::int8; }
  bool has_codes() const { return !args_.x_scale.empty(); }
  bool per_tensor() const { return args_.config.activation_granularity == Granularity::per_tensor; }
  bool per_group() const { return args_.config.activation_granularity == Granularity::per_group; }

  Thread thread_buffers(int index) const { return buffers_.thread(f_, plan_, arena_, index); }

  // Calls work(first, last, buffers) for ranges of units, which cover all. Each thread begins with a run of adjacent
  // units of its own, the same in every call: cores that share no cache then find x, weights and y where they left
  // them. One that has finished its run takes units of the others', so that a slow core delays nobody. With
  // `whole_runs` a thread takes its run as one range, but if it comes so late that another has begun with it, unit by
  // unit like that one.
  template <class Work>
  void for_each_range(std::int64_t units, bool whole_runs, const Work& work) {
    const int threads = static_cast<int>(std::min<std::int64_t>(units, plan_.most_threads));
    const auto begin = [&](int run) { return units * run / threads; };
    for (int run = 0; run < threads; ++run) std::construct_at(&buffers_.next[run], begin(run));
    const auto task = [&](int index) {
      Thread buffers = thread_buffers(index);
      for (int turn = 0; turn < threads; ++turn) {
        const int run = (index + turn) % threads;
        std::atomic<std::int64_t>& next = buffers_.next[run].unit;
        std::int64_t untouched = begin(run);
        if (whole_runs && turn == 0 &&
            next.compare_exchange_strong(untouched, begin(run + 1), std::memory_order_relaxed)) {
          work(begin(run), begin(run + 1), buffers);
        }
        while (next.load(std::memory_order_relaxed) < begin(run + 1)) {  // a cache line that is only read is not moved
          const std::int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
          if (unit < begin(run + 1)) work(unit, unit + 1, buffers);
        }
      }
    };
    if (threads == 1) {
      task(0);
    } else {
      run_tasks(*args_.executor, threads, task);
    }
  }

  // Calls work(unit, buffers) for every unit.
  template <class Work>
  void for_each_unit(std::int64_t units, const Work& work) {
    for_each_range(units, /*whole_runs=*/false,
                   [&](std::int64_t unit, std::int64_t, Thread& buffers) { work(unit, buffers); });
  }

  void note_invalid(std::uint32_t invalid) {
    if (invalid != 0) invalid_.fetch_or(invalid, std::memory_order_relaxed);
  }

  void count_tile_calls(std::int64_t calls) {
    tile_calls_.fetch_add(static_cast<std::uint64_t>(calls), std::memory_order_relaxed);
  }

  // Row `token` of x as float32, in place where it is already.
  const float* float_row(std::int64_t token, float* buffer) const {
    if (args_.x.dtype == DType::float32) return reinterpret_cast<const float*>(args_.x.row(token));
    widen(args_.x.row(token), args_.x.dtype, in_features_, buffer);
    return buffer;
  }

  // per_tensor: the one scale for all rows has to be known before the first is quantized.
  void set_tensor_scale() {
    if (has_codes()) {
      tensor_scale_ = args_.x_scale[0];
      return;
    }
    std::atomic<std::uint32_t> largest{0};
    const std::int64_t unit_rows = std::max<std::int64_t>(1, 65536 / in_features_);
    for_each_unit(ceil_div(tokens_, unit_rows), [&](std::int64_t unit, const Thread& thread) {
      std::uint32_t found = 0;
      for (std::int64_t m = unit * unit_rows; m < std::min(tokens_, (unit + 1) * unit_rows); ++m) {
        found = std::max(found, row_functions().absmax(float_row(m, thread.floats), in_features_));
      }
      std::uint32_t seen = largest.load(std::memory_order_relaxed);
      while (seen < found && !largest.compare_exchange_weak(seen, found, std::memory_order_relaxed)) {
      }
    });
    tensor_scale_ = x_scale_of(largest.load(std::memory_order_relaxed));
  }

  // Writes one row of activations, zero padded, as pack_tokens reads it, and the Activations of its groups, `stride`
  // apart.
  void prepare_row(std::int64_t token, float* buffer, std::byte* out, Activation* activations,
                   std::int64_t stride) const {
    const std::int64_t used = in_features_ * plan_.x_element;
    std::memset(out + used, 0, static_cast<std::size_t>(plan_.row_bytes - used));
    const float* x = has_codes() ? nullptr : float_row(token, buffer);
    const float row_scale = has_codes() || per_group() ? 0.0f : scale_of_row(x);
    for (std::int64_t group = 0; group < plan_.groups; ++group, activations += stride) {
      const std::int64_t first = group * plan_.group_k;
      const std::int64_t count = std::min(plan_.group_k, in_features_ - first);
      if (count <= 0) {  // padding
        *activations = {0.0f, 0};
      } else if (has_codes()) {
        *activations = copy_codes(token, group, first, count, reinterpret_cast<std::int8_t*>(out));
      } else if (!is_int8()) {
        std::memcpy(out + first * plan_.x_element, x + first, static_cast<std::size_t>(count) * sizeof(float));
        *activations = {row_scale, 0};
      } else {
        const float scale = per_group() ? x_scale_of(row_functions().absmax(x + first, count)) : row_scale;
        auto* codes = reinterpret_cast<std::int8_t*>(out) + first;
        const std::int32_t sum = row_functions().quantize_x(x + first, count, scale, codes);
        *activations = {scale, f_.offset_codes ? -sum : 0};
      }
    }
  }

  // The one scale of a row; float32 activations: 1, or NaN.
  float scale_of_row(const float* x) const {
    if (is_int8() && per_tensor()) return tensor_scale_;
    const std::uint32_t absmax = row_functions().absmax(x, in_features_);
    if (is_int8()) return x_scale_of(absmax);
    return absmax < kInfinityBits ? 1.0f : quiet_nan();
  }

  Activation copy_codes(std::int64_t token, std::int64_t group, std::int64_t first, std::int64_t count,
                        std::int8_t* out) const {
    const auto* codes = reinterpret_cast<const std::int8_t*>(args_.x.row(token)) + first;
    std::memcpy(out + first, codes, static_cast<std::size_t>(count));
    std::int32_t sum = 0;
    for (std::int64_t k = 0; f_.offset_codes && k < count; ++k) sum += codes[k];
    if (per_tensor()) return {tensor_scale_, -sum};
    const std::int64_t scales = per_group() ? weight_groups(in_features_, args_.config) : 1;  // of a row
    return {args_.x_scale[static_cast<std::size_t>(token * scales + (per_group() ? group : 0))], -sum};
  }

  // Finished sums of `tokens` adjacent tokens from `token` on, whose Activations begin at `x`; of groups they are
  // scaled.
  void store(const std::int32_t* sums, std::int64_t sums_stride, std::int64_t token, std::int64_t tokens,
             std::int64_t row, std::int64_t rows, const Activation* x) const {
    const auto element = static_cast<std::int64_t>(size_of(args_.y.dtype));
    f_.store({.sums = sums,
              .sums_stride = sums_stride,
              .tokens = tokens,
              .rows = rows,
              .x = plan_.grouped ? nullptr : x,
              .w_scale = w_scale_ + (plan_.grouped || one_scale_ ? 0 : row),
              .bias = bias_ == nullptr ? nullptr : bias_ + row,
              .y = args_.y.row(token) + row * element,
              .y_stride = args_.y.row_stride * element,
              .dtype = args_.y.dtype});
  }

  // ---- blocks of tokens are packed, then multiplied panel by panel ----

  // Tiles of tokens are of equal size, up to one: no small last one that computes slowly.
  std::int64_t token_tiles(std::int64_t count) const { return ceil_div(count, plan_.token_tile); }
  std::int64_t first_token(std::int64_t tile, std::int64_t count) const { return tile * count / token_tiles(count); }

  // Where the tile of tokens [first, last) of a block begins, for the block of k that begins at k: all tiles of a block
  // of k are adjacent, in the order in which they are read.
  std::byte* packed_tile(const PackedTokens& x, std::int64_t k, std::int64_t k_count, std::int64_t first,
                         std::int64_t count) const {
    return x.codes + (k * count + first * k_count) * f_.token_element;
  }

  // Those of the tile that begins at token `first` of a block.
  Activation* activations_of(const PackedTokens& x, std::int64_t first) const {
    return x.activations + first * plan_.groups;
  }

  std::int64_t k_count(std::int64_t k) const { return std::min(plan_.k_block, plan_.k_padded - k); }

  void pack_block(std::int64_t begin, std::int64_t count) {
    for_each_unit(token_tiles(count), [&](std::int64_t tile, const Thread& thread) {
      pack_tile(begin, first_token(tile, count), first_token(tile + 1, count), count, thread);
    });
  }

  // Tokens [first, last) of the block of `count` tokens that begins at token `begin`.
  void pack_tile(std::int64_t begin, std::int64_t first, std::int64_t last, std::int64_t count,
                 const Thread& thread) const {
    for (std::int64_t m = first; m < last; ++m) {
      prepare_row(begin + m, thread.floats, thread.rows + (m - first) * plan_.row_bytes,
                  activations_of(thread.x, first) + m - first, last - first);
    }
    for (std::int64_t k = 0; k < plan_.k_padded; k += plan_.k_block) {
      f_.pack_tokens(thread.rows + k * plan_.x_element, plan_.row_bytes, last - first, k_count(k),
                     packed_tile(thread.x, k, k_count(k), first, count));
    }
  }

  void multiply_block(std::int64_t begin, std::int64_t count) {
    const std::int64_t tiles = token_tiles(count);
    const std::int64_t splits = std::min(plan_.splits, tiles);
    // With whole runs there is one tile of tokens, so that units are panels.
    for_each_range(plan_.panels * splits, plan_.whole_runs, [&](std::int64_t unit, std::int64_t end, Thread& thread) {
      if (plan_.own_x && !thread.has_x) {
        pack_tile(begin, 0, count, count, thread);
        thread.has_x = true;
      }
      const std::int64_t panel = unit % plan_.panels, split = unit / plan_.panels;
      const std::int64_t row = plan_.first_row(panel);
      const std::int64_t rows = std::min(plan_.first_row(panel + end - unit), shape_.out_features) - row;
      const TokenTiles of = {begin, count, split * tiles / splits, (split + 1) * tiles / splits};
      note_invalid(plan_.direct ? multiply_packed(row, rows, of, thread) : multiply_unpacked(row, rows, of, thread));
    });
  }

  // Adjacent packed rows, from `row` on, in a layout that `direct` reads.
  struct PackedRows {
    const std::uint8_t* tiles;
    std::int64_t row_bytes;
    std::int64_t steps;
    LayoutFunctions::Direct direct;
    std::int64_t row, rows;
  };

  // A tile of tokens, packed, and where its sums and the scales of weights that it meets go.
  struct TokenTile {
    std::int64_t token, tokens;
    const std::byte* packed;
    const Activation* x;
    std::int32_t* sums;
    float* group_scales;
    bool has_scales;  // with Plan::keeps_scales: an earlier tile has copied them
  };

  const LayoutFunctions& layout() const { return f_.layout(shape_.layout); }

  // Tile `tile` of a block of tokens.
  TokenTile token_tile(std::int64_t tile, const TokenTiles& of, const Thread& thread, std::int32_t* sums) const {
    const std::int64_t first = first_token(tile, of.count);
    return {of.block + first,
            first_token(tile + 1, of.count) - first,
            packed_tile(thread.x, 0, plan_.k_padded, first, of.count),
            activations_of(thread.x, first),
            sums,
            thread.group_scales,
            plan_.keeps_scales && tile > of.begin};
  }

  // The scales of groups [group, group + count) of `rows` rows from `row` on, [group][out_rows], whose padding is 0.
  void copy_group_scales(std::int64_t row, std::int64_t rows, std::int64_t group, std::int64_t count, float* out,
                         std::int64_t out_rows) {
    const std::int64_t row_groups = weight_groups(in_features_, args_.config);
    const std::int64_t present = std::min(count, row_groups - group);
    const auto* scales = static_cast<const std::uint16_t*>(args_.qweight_scale.data) + row * row_groups + group;
    if (rows < out_rows || present < count) std::fill_n(out, count * out_rows, 0.0f);
    if (row_functions().transpose_scales(scales, row_groups, rows, present, out, out_rows) != 0) {
      unusable_.store(true, std::memory_order_relaxed);
    }
    // Those of the next rows, probably: the hardware does not see a stream in pieces that are so far apart.
    if (present == row_groups && rows == kTileRows) {
      const std::uint16_t* next = scales + rows * row_groups;
      const std::int64_t bytes = std::min(kPrefetchedScaleBytes, 2 * rows * row_groups);
      for (std::int64_t i = 0; i < bytes / 2; i += 32) __builtin_prefetch(next + i);
    }
  }

  // All groups of a tile of tokens, times rows whose scales have been copied to `w_scale`.
  Groups groups_of(const TokenTile& t, const float* w_scale) const { return {plan_.group_k, t.x, t.tokens, w_scale}; }

  // Packed weights are multiplied as they are: every tile of tokens reads all of the panel, and the scales per group
  // that the first of them has copied.
  std::uint32_t multiply_packed(std::int64_t row, std::int64_t rows, const TokenTiles& of, const Thread& thread) {
    PackedRows w = {payload_ + row * shape_.payload_row_bytes,
                    shape_.payload_row_bytes,
                    shape_.steps(),
                    layout().direct,
                    row,
                    rows};
    std::uint32_t invalid = plan_.recode ? recode_panel(w, thread.recoded) : 0;
    alignas(kCacheLine) std::int32_t sums[kKeptSums];
    for (std::int64_t tile = of.begin; tile < of.end; ++tile) {
      const TokenTile t = token_tile(tile, of, thread, sums);
      const std::int64_t streamed = multiply_streams(w, t, invalid);
      invalid |= multiply_rows(w, streamed, t);
    }
    count_tile_calls(ceil_div(rows, kTileRows) * (of.end - of.begin));
    return invalid;
  }

  // Turns 1.6-bit rows into the same rows at 2 bits. Returns nonzero where a code is invalid.
  std::uint32_t recode_panel(PackedRows& w, std::uint8_t* recoded) const {
    const std::int64_t steps = plan_.k_padded / kStepCodes;
    const std::uint32_t invalid = recode_rows(w.tiles, w.rows, 0, w.steps, steps, recoded);
    w = {recoded, steps * 4, steps, f_.two_bit.direct, w.row, w.rows};
    return invalid;
  }

  // Rows [first, rows) of the panel times a tile of tokens: so many sums at a time as are kept, then stored.
  std::uint32_t multiply_rows(const PackedRows& w, std::int64_t first, const TokenTile& t) {
    const std::int64_t kept_rows = kKeptSums / (t.tokens * kTileRows) * kTileRows;
    std::uint32_t invalid = 0;
    for (std::int64_t kept = first; kept < w.rows; kept += kept_rows) {
      const std::int64_t end = std::min(w.rows, kept + kept_rows);
      for (std::int64_t r = kept; r < end; r += kTileRows) {
        const std::int64_t group_rows = std::min(kTileRows, end - r);
        prefetch_outputs(t.token, t.tokens, w.row + r, group_rows);
        float* scales = t.group_scales + (plan_.keeps_scales ? r * plan_.groups : 0);
        if (plan_.grouped && !t.has_scales) {
          copy_group_scales(w.row + r, group_rows, 0, plan_.groups, scales, kTileRows);
        }
        const Groups groups = groups_of(t, scales);
        invalid |= w.direct(w.tiles + r * w.row_bytes, group_rows, w.steps, t.packed, t.tokens,
                            plan_.grouped ? &groups : nullptr, t.sums + (r - kept) * t.tokens);
      }
      for (std::int64_t r = kept; r < end; r += kTileRows) {
        store(t.sums + (r - kept) * t.tokens, kTileRows, t.token, t.tokens, w.row + r, std::min(kTileRows, end - r),
              t.x);
      }
    }
    return invalid;
  }

  // Few tokens times as many of the first rows as make equal runs of full tiles, which are read side by side. Returns
  // their number: 0 where the tokens are too many, or the kernel has no streams.
  std::int64_t multiply_streams(const PackedRows& w, const TokenTile& t, std::uint32_t& invalid) {
    if (plan_.recode || plan_.keeps_scales || t.tokens > layout().stream_tokens) return 0;
    const Groups groups = groups_of(t, t.group_scales);
    const std::int64_t streams = streams_of(t.tokens);
    const std::int64_t run = w.rows / (streams * kTileRows) * kTileRows;
    const std::int64_t kept_rows = plan_.grouped ? kTileRows : kKeptSums / (streams * t.tokens) / kTileRows * kTileRows;
    for (std::int64_t kept = 0; kept < run; kept += kept_rows) {
      const std::int64_t count = std::min(run - kept, kept_rows);
      const std::uint8_t* runs[kMostStreams];
      for (std::int64_t s = 0; s < streams; ++s) runs[s] = w.tiles + (s * run + kept) * w.row_bytes;
      for (std::int64_t s = 0; plan_.grouped && s < streams; ++s) {
        copy_group_scales(w.row + s * run + kept, kTileRows, 0, plan_.groups,
                          t.group_scales + s * plan_.groups * kTileRows, kTileRows);
      }
      invalid |= layout().direct_streams(runs, count / kTileRows, w.steps, t.packed, t.tokens,
                                         plan_.grouped ? &groups : nullptr, t.sums, kept_rows);
      for (std::int64_t s = 0; s < streams; ++s) {
        store(t.sums + s * t.tokens * kept_rows, kept_rows, t.token, t.tokens, w.row + s * run + kept, count, t.x);
      }
    }
    return streams * run;
  }

  // Weights are unpacked, a block of k at a time, which all tiles of tokens then read.
  std::uint32_t multiply_unpacked(std::int64_t row, std::int64_t rows, const TokenTiles& of, const Thread& thread) {
    const std::int64_t base = first_token(of.begin, of.count);
    std::uint32_t invalid = 0;
    for (std::int64_t k = 0; k < plan_.k_padded; k += plan_.k_block) {
      invalid |= unpack_panel(row, rows, k, thread);
      if (plan_.grouped) {
        copy_group_scales(row, rows, k / plan_.group_k, ceil_div(k_count(k), plan_.group_k), thread.group_scales,
                          f_.panels.rows);
      }
      for (std::int64_t tile = of.begin; tile < of.end; ++tile) {
        const std::int64_t first = first_token(tile, of.count);
        const std::int64_t tokens = first_token(tile + 1, of.count) - first;
        std::int32_t* sums = thread.sums + (first - base) * f_.panels.rows;
        const Activation* x = activations_of(thread.x, first);
        if (k == 0) std::fill_n(sums, tokens * f_.panels.rows, 0);  // the bits of int32 and float zero are the same
        const bool last_block = k + plan_.k_block >= plan_.k_padded;
        if (last_block) prefetch_outputs(of.block + first, tokens, row, rows);
        prefetch_weights(row, k, tile - of.begin, of.end - of.begin);
        const Groups groups = {plan_.group_k, x + k / plan_.group_k * tokens, tokens, thread.group_scales};
        f_.panels.gemm(thread.panel, packed_tile(thread.x, k, k_count(k), first, of.count), tokens, k_count(k),
                       plan_.grouped ? &groups : nullptr, sums);
        if (last_block) store(sums, f_.panels.rows, of.block + first, tokens, row, rows, x);
      }
    }
    count_tile_calls(ceil_div(plan_.k_padded, plan_.k_block) * (of.end - of.begin));
    return invalid;
  }

  // While sums are computed, the cache lines come that store will write to,
  void prefetch_outputs(std::int64_t token, std::int64_t tokens, std::int64_t row, std::int64_t rows) const {
    const auto element = static_cast<std::int64_t>(size_of(args_.y.dtype));
    for (std::int64_t m = 0; m < tokens; ++m) {
      const std::byte* y = args_.y.row(token + m) + row * element;
      for (std::int64_t byte = 0; byte < rows * element; byte += 64) __builtin_prefetch(y + byte, /*write*/ 1);
    }
  }

  // and, a part with each of `parts` calls of gemm, the weights that are unpacked next: of the same panel, or of the
  // one that this thread probably takes then.
  void prefetch_weights(std::int64_t row, std::int64_t k, std::int64_t part, std::int64_t parts) const {
    std::int64_t next_k = k + plan_.k_block;
    if (next_k >= plan_.k_padded) {
      next_k = 0;
      row += f_.panels.rows;
    }
    const std::int64_t rows = std::min(f_.panels.rows, shape_.out_features - row);
    const std::int64_t step = next_k / step_codes(shape_.layout);
    const std::int64_t steps = std::min(shape_.steps() - step, plan_.k_block / step_codes(shape_.layout));
    for (std::int64_t r = 0; r < rows; r += kTileRows) {
      const std::int64_t tile_rows = std::min(kTileRows, rows - r);
      const std::uint8_t* words = payload_ + (row + r) * shape_.payload_row_bytes + step * tile_rows * 4;
      const std::int64_t bytes = steps * tile_rows * 4;
      for (std::int64_t byte = bytes * part / parts; byte < bytes * (part + 1) / parts; byte += 64) {
        __builtin_prefetch(words + byte);
      }
    }
  }

  std::uint32_t unpack_panel(std::int64_t row, std::int64_t rows, std::int64_t k, const Thread& thread) const {
    const std::uint8_t* tiles = payload_ + row * shape_.payload_row_bytes;
    const std::int64_t step = k / step_codes(shape_.layout);
    const std::int64_t last = std::min(shape_.steps(), (k + plan_.k_block) / step_codes(shape_.layout));
    if (!plan_.recode) {
      return layout().unpack_panel(tiles, shape_.payload_row_bytes, rows, step, last, thread.panel);
    }
    const std::int64_t steps = k_count(k) / kStepCodes;
    const std::uint32_t invalid = recode_rows(tiles, rows, step, last, steps, thread.recoded);
    return invalid | f_.two_bit.unpack_panel(thread.recoded, steps * 4, rows, 0, steps, thread.panel);
  }

  // Steps [step_begin, step_end) of 1.6-bit rows that begin at a tile as `recoded_steps` steps of 2 bits.
  std::uint32_t recode_rows(const std::uint8_t* tiles, std::int64_t rows, std::int64_t step_begin,
                            std::int64_t step_end, std::int64_t recoded_steps, std::uint8_t* recoded) const {
    const auto recode = f_.base3_recode != nullptr ? f_.base3_recode : recode_base3;
    std::uint32_t invalid = 0;
    for (std::int64_t row = 0; row < rows; row += kTileRows) {
      invalid |= recode(tiles + row * shape_.payload_row_bytes, std::min(kTileRows, rows - row), step_begin, step_end,
                        recoded + row * recoded_steps * 4);
    }
    return invalid;
  }

  const TileFunctions& f_;
  const LinearArgs& args_;
  const PackedShape& shape_;
  const Plan& plan_;
  const Arena arena_;
  const Buffers buffers_;
  const std::int64_t tokens_;
  const std::int64_t in_features_;
  const bool one_scale_;
  const float* w_scale_;  // of every row, or of kMostStoredRows where all have the same
  const float* bias_ = nullptr;
  const std::uint8_t* const payload_;
  float tensor_scale_ = 0.0f;
  std::atomic<std::uint32_t> invalid_{0};
  std::atomic<bool> unusable_{false};  // a scale of a group
  std::atomic<std::uint64_t> tile_calls_{0};
};

std::size_t bytes_of(const TileFunctions& f, const Plan& plan, const PackedShape& shape) {
  Arena measure;
  Buffers(f, plan, shape, measure);
  return measure.bytes();
}

}  // namespace

// More tokens take no less memory, but for the two counts at which a call goes another way.
std::size_t TiledKernel::workspace_size(std::int64_t tokens, const PackedShape& shape, const BitQuantConfig& config,
                                        int threads) const {
  std::size_t bytes = 0;
  for (const std::int64_t count : {tokens, functions_.direct_tokens, functions_.panels.token_tile}) {
    if (count < 1 || count > tokens) continue;
    bytes = std::max(bytes, bytes_of(functions_, Plan(functions_, count, shape, config, threads), shape));
  }
  return bytes;
}

void TiledKernel::operator()(const LinearArgs& args) const {
  if (args.x.rows == 0) return;
  const Plan plan(functions_, args.x.rows, args.shape, args.config, threads_of(*args.executor));
  const auto run = [&](std::byte* memory) {
    count_tiles(Run(functions_, args, args.shape, plan, Arena(memory)).run());
  };
  const std::size_t bytes = bytes_of(functions_, plan, args.shape);
  if (!args.workspace.empty()) {
    assert(args.workspace.size() >= bytes);
    run(args.workspace.data());
  } else if (bytes <= kStackBytes) {
    alignas(kCacheLine) std::byte memory[kStackBytes];
    run(memory);
  } else {
    run(AlignedArray<std::byte>(static_cast<std::int64_t>(bytes)).data());
  }
}

}  // namespace bitcore
