#include "bitmodels/workspace.h"

#include <utility>

namespace bitmodels::detail {

std::byte* Workspace::at_least(std::size_t bytes) {
  if (bytes > bytes_) {
    bytes_ = 0;
    memory_.reset();  // Not both at the same time.
    memory_ = std::make_unique<bitcore::AlignedArray<std::byte>>(static_cast<std::int64_t>(bytes));
    bytes_ = bytes;
  }
  return memory_ ? memory_->data() : nullptr;
}

std::unique_ptr<Workspace> WorkspacePool::take() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) {
    auto workspace = std::make_unique<Workspace>();
    free_.reserve(made_ + 1);  // Now, because give_back() must not fail.
    ++made_;
    return workspace;
  }
  std::unique_ptr<Workspace> workspace = std::move(free_.back());
  free_.pop_back();
  return workspace;
}

void WorkspacePool::give_back(std::unique_ptr<Workspace> workspace) noexcept {
  const std::lock_guard lock(mutex_);
  free_.push_back(std::move(workspace));
}

}  // namespace bitmodels::detail
