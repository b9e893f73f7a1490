// Any bytes as a safetensors file: refused with a QuantizationError, or every tensor can be read to its last byte.
#include <memory>

#include "bitcore/exceptions.h"
#include "bitcore/io.h"
#include "fuzz/support.h"

namespace bitcore::fuzz {
namespace {

template <class Call>
void read_or_refuse(const Call& call) {
  throws<QuantizationError>(call);
}

// Every byte of a view, so that the sanitizer sees each access.
unsigned touch(const void* data, std::size_t bytes) {
  unsigned sum = 0;
  for (std::size_t i = 0; i < bytes; ++i) sum += static_cast<const std::uint8_t*>(data)[i];
  return sum;
}

void read(const TensorEntry& entry) {
  volatile unsigned sink = touch(entry.bytes.data(), entry.bytes.size());
  read_or_refuse([&] {
    const ConstMatrixView view = entry.matrix();
    require(view.rows >= 0 && view.cols >= 0, "sizes are not negative");
    require(static_cast<std::size_t>(view.rows * view.cols) * size_of(view.dtype) == entry.bytes.size(),
            "a matrix has the bytes of its shape");
    require(reinterpret_cast<std::uintptr_t>(view.data) % size_of(view.dtype) == 0 || entry.bytes.empty(),
            "tensors are aligned");
  });
  read_or_refuse([&] {
    const ConstVectorView view = entry.vector();
    require(static_cast<std::size_t>(view.size) * size_of(view.dtype) == entry.bytes.size(),
            "a vector has the bytes of its shape");
  });
  read_or_refuse([&] {
    const std::vector<float> values = entry.floats();
    require(static_cast<std::int64_t>(values.size()) == entry.numel(), "floats has an element for each of the tensor");
    sink = touch(values.data(), values.size() * sizeof(float));
  });
}

void check(std::span<const std::byte> bytes) {
  const SafetensorsFile file = SafetensorsFile::from_bytes(bytes, "input");
  for (const auto& [name, entry] : file.tensors()) {
    require(&file.tensor(name) == &entry && file.contains(name), "a tensor is found by its name");
    read(entry);
  }
  for (const auto& [key, value] : file.metadata())
    require(file.metadata().at(key) == value, "metadata is found by its key");
}

}  // namespace
}  // namespace bitcore::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bitcore::fuzz;
  throws<bitcore::QuantizationError>([&] { check(std::as_bytes(std::span(data, size))); });
  return 0;
}
