// The life of a ternary layer in C++: trained, packed, saved, read again, and run without an allocation.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "bitcore/exceptions.h"
#include "bitcore/executor.h"
#include "bitcore/io.h"
#include "bitcore/ops/bitlinear.h"
#include "bitlayers/bitlinear.h"

// Counts what this program allocates, to show that forward with a workspace does not.
std::int64_t allocations = 0;
void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

constexpr std::int64_t kTokens = 64, kIn = 100, kOut = 40;

// Each token has a scale of its own: what one token gives does not depend on the others.
const bitcore::BitQuantConfig kConfig{.activation_granularity = bitcore::Granularity::per_channel};

using Floats = std::vector<float>;

Floats random_floats(std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  Floats values(static_cast<std::size_t>(count));
  for (float& value : values) value = uniform(engine);
  return values;
}

bool require(bool holds, const char* what) {
  std::cout << (holds ? "ok      " : "FAILED  ") << what << "\n";
  if (!holds) std::exit(EXIT_FAILURE);
  return holds;
}

// One step of gradient descent; returns the mean squared error before it.
float train_step(const Floats& x, const Floats& target, Floats& weight, Floats& bias) {
  Floats y(target.size()), dy(target.size()), dweight(weight.size()), dbias(bias.size());
  const auto saved = bitcore::bitlinear::forward_training({x.data(), kTokens, kIn}, {weight.data(), kOut, kIn},
                                                          {bias.data(), kOut}, kConfig, {y.data(), kTokens, kOut});
  float loss = 0.0f;
  for (std::size_t i = 0; i < y.size(); ++i) {
    dy[i] = 2.0f * (y[i] - target[i]) / static_cast<float>(y.size());
    loss += (y[i] - target[i]) * (y[i] - target[i]) / static_cast<float>(y.size());
  }
  bitcore::bitlinear::backward({dy.data(), kTokens, kOut}, saved, kConfig,
                               {.dx = {}, .dweight = {dweight.data(), kOut, kIn}, .dbias = dbias.data()});
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] -= 0.5f * dweight[i];
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] -= 0.5f * dbias[i];
  return loss;
}

int main() {
  const Floats x = random_floats(kTokens * kIn, 1), target = random_floats(kTokens * kOut, 2);
  Floats weight = random_floats(kOut * kIn, 3), bias(kOut), y(kTokens * kOut), again(y.size());
  const bitcore::ConstMatrixView x_view(x.data(), kTokens, kIn);
  const bitcore::ConstVectorView bias_view(bias.data(), kOut);

  // Training: straight-through gradients move full-precision weights.
  const float first = train_step(x, target, weight, bias);
  float last = first;
  for (int step = 0; step < 100; ++step) last = train_step(x, target, weight, bias);
  require(last < 0.5f * first, "training halves the loss");

  // Packing, once; then inference, any number of times. A layer holds its config, packed weight, scales and bias.
  const auto layer = bitlayers::BitLinear::deploy({weight.data(), kOut, kIn}, bias_view, kConfig);
  layer.forward(x_view, {y.data(), kTokens, kOut});
  bitcore::bitlinear::forward_training(x_view, {weight.data(), kOut, kIn}, bias_view, kConfig,
                                       {again.data(), kTokens, kOut});
  require(again == y, "training and inference return the same bits");

  // Memory that is reused from call to call: nothing is allocated.
  bitcore::bitlinear::Options options{.executor = &bitcore::serial_executor()};
  std::vector<std::byte> workspace(layer.workspace_size(kTokens, options));
  options.workspace = workspace;
  const std::int64_t before = allocations;
  layer.forward(x_view, {again.data(), kTokens, kOut}, options);
  require(allocations == before && again == y, "with a workspace forward allocates nothing");

  bitcore::ThreadPool threads(2);
  layer.forward(x_view, {again.data(), kTokens, kOut}, {.executor = &threads});
  require(again == y, "threads of the program's own, the same bits");

  // A file is read in place, and every byte of it is checked. The layer keeps it open.
  bitcore::SafetensorsWriter writer;
  layer.add_to(writer, "layer.");
  writer.save("layer.safetensors");
  const auto file = std::make_shared<const bitcore::SafetensorsFile>("layer.safetensors");
  const auto names = bitlayers::LayerTensors::find(*file, "layer.");
  const auto loaded = bitlayers::BitLinear::load(file, names, kOut, kIn, kConfig);
  loaded.forward(x_view, {again.data(), kTokens, kOut});
  require(again == y, "a saved layer returns the same bits");

  // An argument that does not fit is an exception that says what and why.
  try {
    bitlayers::BitLinear::load(file, names, kOut, kIn + 1, kConfig);
    require(false, "a wrong width is an error");
  } catch (const bitcore::QuantizationError& error) {
    std::cout << "ok      QuantizationError: " << error.what() << "\n";
  }
}
