// Reads a safetensors file and writes all that is in it to another: copy_safetensors FROM TO
#include <exception>
#include <iostream>

#include "bitcore/io.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: copy_safetensors FROM TO\n";
    return 2;
  }
  try {
    const bitcore::SafetensorsFile from(argv[1]);
    bitcore::SafetensorsWriter to;
    for (const auto& [key, value] : from.metadata()) to.set_metadata(key, value);
    for (const auto& [name, entry] : from.tensors()) to.add(name, entry.dtype, entry.shape, entry.bytes);
    to.save(argv[2]);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
