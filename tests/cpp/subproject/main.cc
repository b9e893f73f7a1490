// Links a good part of the engine: the registry names every kernel.
#include <iostream>

#include "bitcore/kernels/registry.h"

int main() {
  for (const auto& kernel : bitcore::KernelRegistry::all_kernels()) std::cout << kernel->name() << "\n";
  return bitcore::KernelRegistry::all_kernels().empty() ? 1 : 0;
}
