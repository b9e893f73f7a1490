// Continues a prompt of token ids: next_tokens DIRECTORY 1 2 3
#include <cstdlib>
#include <exception>
#include <iostream>
#include <vector>

#include "bitmodels/language_model.h"
#include "bitmodels/sampler.h"

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cout << "usage: next_tokens DIRECTORY TOKEN...\n";
    return 0;
  }
  try {
    const auto model = bitmodels::LanguageModel::open(argv[1]);
    std::vector<bitmodels::Token> tokens;
    for (int i = 2; i < argc; ++i) tokens.push_back(std::atoi(argv[i]));

    bitmodels::Session session = model.new_session();
    bitmodels::SamplingParameters parameters;
    parameters.temperature = 0;
    bitmodels::Sampler sampler(parameters, model.info().vocab_size);
    std::vector<float> logits(static_cast<std::size_t>(model.info().vocab_size));
    for (int i = 0; i < 8; ++i) {
      const bitmodels::Input input{&session, tokens, bitmodels::Logits::last, logits};
      model.forward({&input, 1});
      tokens = {sampler.sample(logits)};
      std::cout << tokens[0] << " ";
    }
    std::cout << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
