// One pass of the decoder over rows of any number of sessions.
#pragma once

#include <atomic>
#include <cstdint>

#include "bitcore/executor.h"
#include "bitmodels/model.h"
#include "bitmodels/workspace.h"

namespace bitmodels::detail {

/// Most rows of one pass: a longer prompt takes several. Enough for the kernels to be at their peak, and few enough for
/// activations of all of them to stay in the second-level caches: with 512 a prompt took 5 to 8 % longer (Emerald
/// Rapids), although the weights were then read once instead of four times.
inline constexpr std::int64_t kMostRows = 128;

/// Puts the tokens of workspace.segments into their caches, where there is room, and computes workspace.logits and
/// .hidden.
/// @return false if it was cancelled.
bool run_pass(const Model& model, Workspace& workspace, bitcore::Executor& executor,
              const std::atomic<bool>* cancelled);

}  // namespace bitmodels::detail
