// Links a good part of all libraries: a model needs bitlayers, and the registry names every kernel.
#include <iostream>

#include "bitcore/exceptions.h"
#include "bitcore/kernels/registry.h"
#include "bitmodels/mlp.h"

int main() {
  try {
    bitmodels::BitMLPModel::from_pretrained("no model");
    return 1;
  } catch (const bitcore::FileError& error) {
    std::cout << error.what() << "\n";
  }
  for (const auto& kernel : bitcore::KernelRegistry::all_kernels()) std::cout << kernel->name() << "\n";
  return bitcore::KernelRegistry::all_kernels().empty() ? 1 : 0;
}
