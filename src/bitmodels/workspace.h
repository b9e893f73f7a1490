// Memory of a forward pass, kept from call to call.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "bitcore/base/aligned_array.h"
#include "bitmodels/language_model.h"

namespace bitmodels::detail {

/// Adjacent tokens of one session.
struct Segment {
  SessionState* session;
  std::span<const Token> tokens;
  std::int64_t position;        ///< Of the first one.
  std::int64_t first_row;       ///< Of the pass.
  std::int64_t split_row = -1;  ///< Of those rows whose blocks are units of their own; -1: it has none.
};

/// A row whose logits, or whose final norm, are asked for.
struct WantedRow {
  std::int64_t row;
  float* output;  ///< vocab_size floats, or hidden_size.
};

/// Attention of adjacent rows of a segment, of the query heads that share one key head.
struct AttentionUnit {
  const Segment* segment;
  std::int64_t head;  ///< Of keys and values.
  std::int64_t row;   ///< The first one, of the segment.
  std::int64_t rows;
  std::int64_t block;  ///< -1: all of them, one after the other.
};

/// What a call needs for as long as it runs. Its parts only grow, so that calls soon allocate nothing.
class Workspace {
 public:
  std::vector<SessionState*> sessions;
  std::vector<Segment> segments;
  std::vector<WantedRow> logits;
  std::vector<WantedRow> hidden;
  std::vector<AttentionUnit> units;

  /// At least so many bytes, aligned to a cache line; what was in it is lost if it grows.
  std::byte* at_least(std::size_t bytes);

 private:
  std::unique_ptr<bitcore::AlignedArray<std::byte>> memory_;
  std::size_t bytes_ = 0;
};

/// Workspaces that no call uses. Calls at the same time have one each.
class WorkspacePool {
 public:
  std::unique_ptr<Workspace> take();
  void give_back(std::unique_ptr<Workspace> workspace) noexcept;

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
  std::size_t made_ = 0;  // free_ has room for all of them
};

}  // namespace bitmodels::detail
