#include "bitmodels/forward.h"

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "bitcore/base/arena.h"
#include "bitcore/base/checks.h"
#include "bitcore/base/parallel.h"
#include "bitlayers/ternary_embedding.h"

namespace bitmodels::detail {
namespace {

using bitcore::Arena;
using bitlayers::BitLinear;
using bitlayers::BlockAttention;
using bitlayers::kBlockPositions;

// Rows of a table whose products one unit computes: of a head of 2,560 columns 200 us in int8. A multiple of the rows
// that `dense` computes together.
constexpr std::int64_t kTableRows = 1008;

// Elements of rows below which another thread costs more than it saves.
constexpr std::int64_t kElementsPerThread = 1 << 14;

// Queries' rows that one unit of attention takes through all blocks.
constexpr std::int64_t kUnitRows = 32;

// Up to so many rows of a segment the blocks of a head are units of their own.
constexpr std::int64_t kSplitRows = 2;

// What a thread has of the scratch memory is a multiple of it, and begins on a cache line.
constexpr auto kAlignedFloats = static_cast<std::int64_t>(bitcore::kCacheLine / sizeof(float));

// Rows whose logits are computed together.
constexpr std::int64_t kLogitRows = 32;

std::int64_t widest(const Decoder& decoder) {
  const LanguageModelInfo& info = decoder.config.info;
  return std::max({info.hidden_size, info.num_heads * info.head_dim, decoder.config.intermediate_size});
}

using Unit = AttentionUnit;

// The memory of a pass.
struct Buffers {
  Buffers(const Model& model, std::int64_t rows, std::int64_t logit_rows, int threads, std::int64_t split_partials,
          std::size_t linear_bytes, Arena& arena) {
    const LanguageModelInfo& info = model.info();
    const std::int64_t queries = info.num_heads * info.head_dim, keys = info.num_key_value_heads * info.head_dim;
    const std::int64_t inner = model.decoder.config.intermediate_size;
    hidden = arena.take<float>(rows * info.hidden_size);
    x = arena.take<float>(rows * widest(model.decoder));
    query = arena.take<float>(rows * queries);
    key = arena.take<float>(rows * keys);
    value = arena.take<float>(rows * keys);
    gate = arena.take<float>(rows * inner);
    up = arena.take<float>(rows * inner);
    cosines = arena.take<float>(rows * info.head_dim / 2);
    sines = arena.take<float>(rows * info.head_dim / 2);
    const std::int64_t chunk = std::min(logit_rows, kLogitRows);
    logit_x = arena.take<float>(chunk * info.hidden_size);
    logits = arena.take<float>(logit_rows > 1 ? chunk * info.vocab_size : 0);
    const std::int64_t group = info.num_heads / info.num_key_value_heads;
    unit_queries = std::min(kUnitRows, rows) * group;
    for_unit_floats =
        bitcore::round_up(bitlayers::scratch_floats(unit_queries) + unit_queries * (info.head_dim + 4), kAlignedFloats);
    scratch = arena.take<float>(threads * for_unit_floats);
    pointers = arena.take<const float*>(threads * unit_queries * 2);
    visible = arena.take<std::int32_t>(threads * unit_queries);
    partials = arena.take<float>(split_partials * (info.head_dim + 2));
    linear = arena.take<std::byte>(static_cast<std::int64_t>(linear_bytes));
    this->linear_bytes = linear_bytes;
  }

  float *hidden, *x, *query, *key, *value, *gate, *up, *cosines, *sines, *logit_x, *logits;
  float* scratch;
  const float** pointers;
  std::int32_t* visible;
  float* partials;  // of every query and block: o, m, l
  std::byte* linear;
  std::size_t linear_bytes;
  std::int64_t unit_queries, for_unit_floats;
};

class Pass {
 public:
  Pass(const Model& model, Workspace& workspace, bitcore::Executor& executor, const std::atomic<bool>* cancelled)
      : model_(model),
        info_(model.info()),
        config_(model.decoder.config),
        f_(model.functions),
        segments_(workspace.segments),
        logits_(workspace.logits),
        hidden_(workspace.hidden),
        units_(workspace.units),
        executor_(executor),
        cancelled_(cancelled),
        threads_(bitcore::threads_of(executor)),
        rows_(segments_.back().first_row + static_cast<std::int64_t>(segments_.back().tokens.size())),
        group_(info_.num_heads / info_.num_key_value_heads) {
    plan_attention();
    const std::size_t linear_bytes = bytes_of_linears();
    Arena measure;
    take(measure, linear_bytes);
    Arena arena(workspace.at_least(measure.bytes()));
    b_.emplace(take(arena, linear_bytes));
  }

  bool run() {
    embed();
    rotations();
    for (std::size_t i = 0; i < model_.decoder.layers.size(); ++i) {
      if (cancelled_ != nullptr && cancelled_->load(std::memory_order_relaxed)) return false;
      const DecoderLayer& layer = model_.decoder.layers[i];
      attend(layer, static_cast<std::int64_t>(i));
      feed_forward(layer);
    }
    compute_hidden();
    compute_logits();
    return true;
  }

 private:
  // ---- rows -------------------------------------------------------------------------------------------------------

  // row(i) for every row; a row has so many elements.
  template <class Row>
  void for_rows(std::int64_t rows, std::int64_t elements, const Row& row) {
    const std::int64_t least = std::max<std::int64_t>(1, kElementsPerThread / elements);
    bitcore::parallel_ranges(executor_, rows, least, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) row(i);
    });
  }

  void norm(const float* from, const Floats& weight, float* to, std::int64_t elements) {
    for_rows(rows_, elements, [&](std::int64_t row) {
      f_.rms_norm(from + row * elements, weight.data(), elements, config_.rms_norm_eps, to + row * elements);
    });
  }

  void linear(const Linear& linear, const float* x, float* y) { multiply(linear, x, rows_, y); }

  void multiply(const Linear& linear, const float* x, std::int64_t rows, float* y) {
    if (const auto* layer = std::get_if<BitLinear>(&linear)) {
      bitcore::bitlinear::Options options{&executor_, model_.kernel, {b_->linear, b_->linear_bytes}};
      layer->forward({x, rows, layer->in_features()}, {y, rows, layer->out_features()}, options);
      return;
    }
    const DenseTable& table = std::get<DenseTable>(linear);
    const bitlayers::DenseMatrix& w = table.matrix;
    const std::int64_t units = bitcore::ceil_div(w.rows, kTableRows);
    run_units(units, [&](std::int64_t unit, int) {
      const std::int64_t first = unit * kTableRows, last = std::min(w.rows, first + kTableRows);
      f_.dense(w, first, last, x, rows, w.cols, y + first, w.rows);
      if (table.bias.empty()) return;
      for (std::int64_t row = 0; row < rows; ++row) {
        f_.add_scaled(table.bias.data() + first, 1.0f, last - first, y + row * w.rows + first);
      }
    });
  }

  // unit(index, thread) for every index below count, each on one thread.
  template <class Run>
  void run_units(std::int64_t count, const Run& unit) {
    const int tasks = static_cast<int>(std::min<std::int64_t>(threads_, count));
    if (tasks <= 1) {
      for (std::int64_t i = 0; i < count; ++i) unit(i, 0);
      return;
    }
    std::atomic<std::int64_t> next{0};
    bitcore::run_tasks(executor_, tasks, [&](int task) {
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) unit(i, task);
    });
  }

  void add(const float* x) {
    for_rows(rows_, info_.hidden_size, [&](std::int64_t row) {
      const std::int64_t begin = row * info_.hidden_size;
      f_.add_scaled(x + begin, config_.residual_multiplier, info_.hidden_size, b_->hidden + begin);
    });
  }

  const Segment& segment_of(std::int64_t row) const {
    const auto after = std::upper_bound(segments_.begin(), segments_.end(), row,
                                        [](std::int64_t each, const Segment& s) { return each < s.first_row; });
    return *std::prev(after);
  }

  // ---- phases -----------------------------------------------------------------------------------------------------

  void embed() {
    std::atomic<bool> invalid{false};
    const Linear& embedding = *model_.decoder.embedding;
    for_rows(rows_, info_.hidden_size, [&](std::int64_t row) {
      const Segment& segment = segment_of(row);
      const Token token = segment.tokens[static_cast<std::size_t>(row - segment.first_row)];
      float* const out = b_->hidden + row * info_.hidden_size;
      if (const auto* layer = std::get_if<BitLinear>(&embedding)) {
        const bool valid = bitlayers::ternary_row(layer->qweight(), layer->packed_shape(), layer->qweight_scale(),
                                                  layer->config(), token, out);
        if (!valid) invalid.store(true, std::memory_order_relaxed);
      } else {
        f_.dense_row(std::get<DenseTable>(embedding).matrix, token, out);
      }
      if (config_.embedding_multiplier != 1) f_.scale(config_.embedding_multiplier, info_.hidden_size, out);
    });
    if (invalid.load()) bitcore::fail_invalid_code();
  }

  void rotations() {
    const std::int64_t half = info_.head_dim / 2;
    for_rows(rows_, 64 * half, [&](std::int64_t row) {  // a cosine and a sine take as long as dozens of elements
      const Segment& segment = segment_of(row);
      segment.session->rotary->cosines_and_sines(segment.position + row - segment.first_row, b_->cosines + row * half,
                                                 b_->sines + row * half);
    });
  }

  void attend(const DecoderLayer& layer, std::int64_t index) {
    norm(b_->hidden, layer.input_norm, b_->x, info_.hidden_size);
    linear(*layer.query, b_->x, b_->query);
    linear(*layer.key, b_->x, b_->key);
    linear(*layer.value, b_->x, b_->value);
    const std::int64_t queries = info_.num_heads * info_.head_dim;
    for_rows(rows_, queries, [&](std::int64_t row) { rotate_and_store(layer, index, row); });
    attention(index);  // into x
    if (!layer.attention_sub_norm.empty()) norm(b_->x, layer.attention_sub_norm, b_->x, queries);
    linear(*layer.output, b_->x, b_->query);
    add(b_->query);
  }

  void feed_forward(const DecoderLayer& layer) {
    const std::int64_t inner = config_.intermediate_size;
    norm(b_->hidden, layer.feed_forward_norm, b_->x, info_.hidden_size);
    linear(*layer.gate, b_->x, b_->gate);
    linear(*layer.up, b_->x, b_->up);
    for_rows(rows_, 4 * inner, [&](std::int64_t row) {
      float* const gate = b_->gate + row * inner;
      f_.activate(config_.activation, gate, b_->up + row * inner, inner, gate);
      if (layer.feed_forward_sub_norm.empty()) return;
      f_.rms_norm(gate, layer.feed_forward_sub_norm.data(), inner, config_.rms_norm_eps, gate);
    });
    linear(*layer.down, b_->gate, b_->x);
    add(b_->x);
  }

  // Norms and rotation of the heads of a row; its keys and values go into the cache.
  void rotate_and_store(const DecoderLayer& layer, std::int64_t index, std::int64_t row) {
    const std::int64_t dim = info_.head_dim;
    const float* const cosines = b_->cosines + row * dim / 2;
    const float* const sines = b_->sines + row * dim / 2;
    const auto heads = [&](float* first, std::int64_t count, const Floats& weight) {
      for (float* head = first; head < first + count * dim; head += dim) {
        if (!weight.empty()) f_.rms_norm(head, weight.data(), dim, config_.rms_norm_eps, head);
        f_.rotate(head, cosines, sines, dim / 2);
      }
    };
    heads(b_->query + row * info_.num_heads * dim, info_.num_heads, layer.query_norm);
    float* const key = b_->key + row * info_.num_key_value_heads * dim;
    const float* const value = b_->value + row * info_.num_key_value_heads * dim;
    heads(key, info_.num_key_value_heads, layer.key_norm);

    const Segment& segment = segment_of(row);
    const std::int64_t position = segment.position + row - segment.first_row;
    const Cache& cache = segment.session->cache;
    const std::int64_t place = position % kBlockPositions;
    for (std::int64_t head = 0; head < info_.num_key_value_heads; ++head) {
      const CacheView view = cache.view(position / kBlockPositions, index, head);
      const std::int64_t offset = place * cache.layout().row_bytes;
      model_.attention.store_row(cache.layout().form, key + head * dim, dim, view.keys + offset,
                                 view.key_scales == nullptr ? nullptr : view.key_scales + place);
      model_.attention.store_row(cache.layout().form, value + head * dim, dim, view.values + offset,
                                 view.value_scales == nullptr ? nullptr : view.value_scales + place);
    }
  }

  // ---- attention --------------------------------------------------------------------------------------------------

  // The units of attention are the same in every layer. Where there are few, the blocks of long contexts are units of
  // their own.
  void plan_attention() {
    units_.clear();
    const bool few = static_cast<std::int64_t>(segments_.size()) * info_.num_key_value_heads < 4 * threads_;
    std::int64_t split_rows = 0;
    for (Segment& segment : segments_) {
      const auto rows = static_cast<std::int64_t>(segment.tokens.size());
      const std::int64_t blocks = blocks_of(segment);
      const bool split = few && threads_ > 1 && rows <= kSplitRows && blocks > 2;
      if (split) {
        segment.split_row = split_rows;
        split_rows += rows;
        most_blocks_ = std::max(most_blocks_, blocks);
      }
      for (std::int64_t head = 0; head < info_.num_key_value_heads; ++head) {
        for (std::int64_t row = 0; row < rows; row += kUnitRows) {
          const std::int64_t count = std::min(kUnitRows, rows - row);
          if (!split) units_.push_back({&segment, head, row, count, -1});
          for (std::int64_t block = 0; split && block < blocks; ++block) {
            units_.push_back({&segment, head, row, count, block});
          }
        }
      }
    }
    split_partials_ = most_blocks_ * split_rows * info_.num_heads;
  }

  // That its last row sees.
  static std::int64_t blocks_of(const Segment& segment) {
    return bitcore::ceil_div(segment.position + static_cast<std::int64_t>(segment.tokens.size()), kBlockPositions);
  }

  void attention(std::int64_t layer) {
    run_units(static_cast<std::int64_t>(units_.size()), [&](std::int64_t unit, int thread) {
      const Unit& u = units_[static_cast<std::size_t>(unit)];
      if (u.block < 0) {
        through_all_blocks(u, layer, thread);
      } else {
        one_block(u, layer, thread);
      }
    });
    if (most_blocks_ == 0) return;
    for (const Segment& segment : segments_) merge_blocks(segment);
  }

  // A thread's memory for a unit: pointers to queries and outputs, what attend_block returns, its scratch.
  struct UnitMemory {
    const float** q;
    float** out;
    std::int32_t* visible;
    float *largest, *sum, *block_largest, *block_sum;
    float* block_out;  // [query][head_dim]
    float* scratch;
  };
  UnitMemory memory_of(int thread) const {
    UnitMemory memory;
    memory.q = b_->pointers + thread * b_->unit_queries * 2;
    memory.out = const_cast<float**>(memory.q + b_->unit_queries);
    memory.visible = b_->visible + thread * b_->unit_queries;
    float* floats = b_->scratch + thread * b_->for_unit_floats;
    memory.scratch = floats;
    floats += bitlayers::scratch_floats(b_->unit_queries);
    memory.block_out = floats;
    floats += b_->unit_queries * info_.head_dim;
    for (float** each : {&memory.largest, &memory.sum, &memory.block_largest, &memory.block_sum}) {
      *each = floats;
      floats += b_->unit_queries;
    }
    return memory;
  }

  float* query_of(const Unit& u, std::int64_t row, std::int64_t group) const {
    return b_->query +
           ((u.segment->first_row + u.row + row) * info_.num_heads + u.head * group_ + group) * info_.head_dim;
  }
  float* output_of(const Unit& u, std::int64_t row, std::int64_t group) const {
    return b_->x + (query_of(u, row, group) - b_->query);
  }

  // The arguments of a block for rows [first, u.rows): those that see a part of it.
  BlockAttention block_of(const Unit& u, std::int64_t layer, std::int64_t block, std::int64_t first,
                          const UnitMemory& memory) const {
    const Cache& cache = u.segment->session->cache;
    const CacheView view = cache.view(block, layer, u.head);
    BlockAttention call{};
    call.form = cache.layout().form;
    call.head_dim = info_.head_dim;
    call.keys = view.keys;
    call.values = view.values;
    call.key_scales = view.key_scales;
    call.value_scales = view.value_scales;
    call.scale = config_.attention_scale;
    call.queries = (u.rows - first) * group_;
    std::int64_t query = 0;
    for (std::int64_t row = first; row < u.rows; ++row) {
      const std::int64_t seen = u.segment->position + u.row + row + 1 - block * kBlockPositions;
      for (std::int64_t group = 0; group < group_; ++group, ++query) {
        memory.q[query] = query_of(u, row, group);
        memory.visible[query] = static_cast<std::int32_t>(std::min(seen, kBlockPositions));
      }
    }
    call.q = memory.q;
    call.visible = memory.visible;
    call.output = memory.out;
    return call;
  }

  // The first row of a unit that sees a part of a block.
  static std::int64_t first_seeing(const Unit& u, std::int64_t block) {
    return std::max<std::int64_t>(0, block * kBlockPositions - u.segment->position - u.row);
  }

  void through_all_blocks(const Unit& u, std::int64_t layer, int thread) {
    const UnitMemory memory = memory_of(thread);
    const std::int64_t last = u.segment->position + u.row + u.rows - 1;
    for (std::int64_t block = 0; block <= last / kBlockPositions; ++block) {
      const std::int64_t first = first_seeing(u, block);
      BlockAttention call = block_of(u, layer, block, first, memory);
      const bool is_first = block == 0;
      call.largest = is_first ? memory.largest : memory.block_largest;
      call.sum = is_first ? memory.sum : memory.block_sum;
      for (std::int64_t query = 0; query < call.queries; ++query) {
        memory.out[query] =
            is_first ? output_of(u, first + query / group_, query % group_) : memory.block_out + query * info_.head_dim;
      }
      model_.attention.attend_block(call, memory.scratch);
      for (std::int64_t query = 0; !is_first && query < call.queries; ++query) {
        const std::int64_t own = first * group_ + query;
        model_.attention.merge(call.largest[query], call.sum[query], memory.out[query], info_.head_dim,
                               memory.largest + own, memory.sum + own, output_of(u, own / group_, own % group_));
      }
    }
    for (std::int64_t query = 0; query < u.rows * group_; ++query) {
      model_.attention.finish(memory.sum[query], info_.head_dim, output_of(u, query / group_, query % group_));
    }
  }

  // Of a query's result of one block: o, m, l. `row` counts the rows that are split.
  float* partial_of(std::int64_t row, std::int64_t head, std::int64_t block) const {
    return b_->partials + ((row * info_.num_heads + head) * most_blocks_ + block) * (info_.head_dim + 2);
  }

  void one_block(const Unit& u, std::int64_t layer, int thread) {
    const UnitMemory memory = memory_of(thread);
    const std::int64_t first = first_seeing(u, u.block);
    if (first >= u.rows) return;
    BlockAttention call = block_of(u, layer, u.block, first, memory);
    call.largest = memory.largest;
    call.sum = memory.sum;
    const auto partial = [&](std::int64_t query) {
      return partial_of(u.segment->split_row + u.row + first + query / group_, u.head * group_ + query % group_,
                        u.block);
    };
    for (std::int64_t query = 0; query < call.queries; ++query) memory.out[query] = partial(query);
    model_.attention.attend_block(call, memory.scratch);
    for (std::int64_t query = 0; query < call.queries; ++query) {
      partial(query)[info_.head_dim] = call.largest[query];
      partial(query)[info_.head_dim + 1] = call.sum[query];
    }
  }

  void merge_blocks(const Segment& segment) {
    if (segment.split_row < 0) return;
    const auto rows = static_cast<std::int64_t>(segment.tokens.size());
    const std::int64_t dim = info_.head_dim;
    for (std::int64_t i = 0; i < rows * info_.num_heads; ++i) {
      const std::int64_t row = i / info_.num_heads, head = i % info_.num_heads;
      float* const out = b_->x + ((segment.first_row + row) * info_.num_heads + head) * dim;
      const float* first = partial_of(segment.split_row + row, head, 0);
      std::copy_n(first, dim, out);
      float largest = first[dim], sum = first[dim + 1];
      const std::int64_t seen = (segment.position + row) / kBlockPositions + 1;
      for (std::int64_t block = 1; block < seen; ++block) {
        const float* const next = partial_of(segment.split_row + row, head, block);
        model_.attention.merge(next[dim], next[dim + 1], next, dim, &largest, &sum, out);
      }
      model_.attention.finish(sum, dim, out);
    }
  }

  // ---- logits -----------------------------------------------------------------------------------------------------

  void final_norm(const WantedRow& wanted, float* out) const {
    f_.rms_norm(b_->hidden + wanted.row * info_.hidden_size, model_.decoder.final_norm.data(), info_.hidden_size,
                config_.rms_norm_eps, out);
  }

  void compute_hidden() {
    for_rows(static_cast<std::int64_t>(hidden_.size()), info_.hidden_size, [&](std::int64_t i) {
      const WantedRow& wanted = hidden_[static_cast<std::size_t>(i)];
      final_norm(wanted, wanted.output);
    });
  }

  void compute_logits() {
    const auto count = static_cast<std::int64_t>(logits_.size());
    for (std::int64_t first = 0; first < count; first += kLogitRows) {
      logits_of(std::span(logits_).subspan(static_cast<std::size_t>(first),
                                           static_cast<std::size_t>(std::min(kLogitRows, count - first))));
    }
  }

  void logits_of(std::span<const WantedRow> rows) {
    const auto count = static_cast<std::int64_t>(rows.size());
    const std::int64_t hidden = info_.hidden_size, vocabulary = info_.vocab_size;
    for_rows(count, hidden,
             [&](std::int64_t i) { final_norm(rows[static_cast<std::size_t>(i)], b_->logit_x + i * hidden); });
    float* const y = count == 1 ? rows[0].output : b_->logits;
    multiply(model_.decoder.head(), b_->logit_x, count, y);
    for_rows(count, vocabulary, [&](std::int64_t i) {
      float* const out = rows[static_cast<std::size_t>(i)].output;
      if (count > 1) std::copy_n(y + i * vocabulary, vocabulary, out);
      if (config_.logits_multiplier != 1) f_.scale(config_.logits_multiplier, vocabulary, out);
    });
  }

  Buffers take(Arena& arena, std::size_t linear_bytes) const {
    return {model_, rows_, static_cast<std::int64_t>(logits_.size()), threads_, split_partials_, linear_bytes, arena};
  }

  std::size_t bytes_of_linears() const {
    std::size_t bytes = 0;
    const bitcore::bitlinear::Options options{&executor_, model_.kernel, {}};
    for (const BitLinear* layer : model_.shapes) bytes = std::max(bytes, layer->workspace_size(rows_, options));
    const auto* head = std::get_if<BitLinear>(&model_.decoder.head());
    const std::int64_t logit_rows = std::min(static_cast<std::int64_t>(logits_.size()), kLogitRows);
    if (head != nullptr && logit_rows > 0) bytes = std::max(bytes, head->workspace_size(logit_rows, options));
    return bytes;
  }

  const Model& model_;
  const LanguageModelInfo& info_;
  const DecoderConfig& config_;
  const bitlayers::LayerFunctions& f_;
  std::vector<Segment>& segments_;
  const std::vector<WantedRow>& logits_;
  const std::vector<WantedRow>& hidden_;
  std::vector<AttentionUnit>& units_;
  bitcore::Executor& executor_;
  const std::atomic<bool>* const cancelled_;
  const int threads_;
  const std::int64_t rows_;
  const std::int64_t group_;      // query heads of a key head
  std::int64_t most_blocks_ = 0;  // of segments whose blocks are units of their own
  std::int64_t split_partials_ = 0;
  std::optional<Buffers> b_;
};

}  // namespace

bool run_pass(const Model& model, Workspace& workspace, bitcore::Executor& executor,
              const std::atomic<bool>* cancelled) {
  return Pass(model, workspace, executor, cancelled).run();
}

}  // namespace bitmodels::detail
