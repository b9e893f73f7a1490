// What a LanguageModel and its sessions hold.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "bitlayers/attention_functions.h"
#include "bitlayers/layer_functions.h"
#include "bitlayers/rotary.h"
#include "bitmodels/cache.h"
#include "bitmodels/decoder.h"
#include "bitmodels/language_model.h"
#include "bitmodels/workspace.h"

namespace bitmodels::detail {

struct Model {
  Model(Decoder decoder, std::string kernel);

  const Decoder decoder;
  const std::string kernel;  ///< Of ternary layers; empty: the registry's choice.
  const bitlayers::LayerFunctions& functions;
  const bitlayers::AttentionFunctions& attention;
  const std::vector<const bitlayers::BitLinear*> shapes;  ///< One of each shape, layout and config in the layers.
  mutable WorkspacePool workspaces;

  const LanguageModelInfo& info() const { return decoder.config.info; }
};

struct SessionState {
  SessionState(std::shared_ptr<const Model> owner, std::int64_t limit,
               std::shared_ptr<const bitlayers::Rotary> rotation, Cache copied)
      : model(std::move(owner)), context_limit(limit), rotary(std::move(rotation)), cache(std::move(copied)) {}

  std::shared_ptr<const Model> model;
  std::int64_t context_limit;
  std::shared_ptr<const bitlayers::Rotary> rotary;  ///< Its frequencies may depend on the limit.
  Cache cache;
  std::atomic<std::int64_t> position{0};
  std::atomic<bool> busy{false};  ///< A forward uses it.
};

}  // namespace bitmodels::detail
