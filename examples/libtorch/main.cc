// Trains a small ternary network with LibTorch, deploys it, and checks that nothing but its size has changed.
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>

#include "bitcore/torch.h"

using bitcore::torch::BitLinear;

// Two ternary layers, quantized by token.
struct Network : torch::nn::Module {
  bitcore::BitQuantConfig config{.activation_granularity = bitcore::Granularity::per_channel};
  BitLinear hidden = register_module("hidden", BitLinear(8, 64, config));
  BitLinear head = register_module("head", BitLinear(64, 2, config));

  torch::Tensor forward(const torch::Tensor& x) { return head->forward(torch::relu(hidden->forward(x))); }
};

int main() {
  torch::manual_seed(0);
  const torch::Tensor x = torch::randn({512, 8});
  const torch::Tensor labels = (x.select(1, 0) * x.select(1, 1) > 0).to(torch::kLong);

  Network network;
  torch::optim::Adam optimizer(network.parameters(), torch::optim::AdamOptions(0.01));
  for (int step = 0; step < 300; ++step) {
    optimizer.zero_grad();
    const torch::Tensor loss = torch::cross_entropy_loss(network.forward(x), labels);
    loss.backward();
    optimizer.step();
    if (step % 100 == 0) std::cout << "step " << step << ": loss " << loss.item<float>() << "\n";
  }

  network.eval();
  const torch::NoGradGuard no_grad;
  const torch::Tensor trained = network.forward(x);
  network.hidden->deploy();
  network.head->deploy();
  const bool same_bits = torch::equal(network.forward(x), trained);
  const float accuracy = (trained.argmax(1) == labels).to(torch::kFloat).mean().item<float>();
  std::cout << "accuracy " << accuracy << ", deployed " << (same_bits ? "with the same bits" : "DIFFERS") << "\n";
  return same_bits && accuracy > 0.9f ? EXIT_SUCCESS : EXIT_FAILURE;
}
