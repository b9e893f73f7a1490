// safetensors, written: the header, the padding behind it, and the tensors in an order that aligns them.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "bitcore/base/checks.h"
#include "bitcore/io.h"
#include "bitcore/io/json.h"
#include "bitcore/io/output_file.h"
#include "bitcore/io/safetensors_header.h"

namespace bitcore {
namespace {

// A cache line, on which tensors in a mapped file should begin.
constexpr std::uint64_t kAlignment = 64;

// One tensor: rows of bytes.
struct Rows {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  const std::byte* data;
  std::size_t rows, row_bytes, stride_bytes;

  std::uint64_t bytes() const { return std::uint64_t{rows} * row_bytes; }
  std::span<const std::byte> row(std::size_t index) const { return {data + index * stride_bytes, row_bytes}; }

  // Tensors of whole cache lines keep the next one aligned to a line; then wider elements come before narrower ones.
  auto order() const {
    return std::tuple(bytes() % kAlignment != 0, -static_cast<std::int64_t>(*dtype_bits(dtype)),
                      std::string_view(name));
  }
};

std::string file_dtype(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "F32";
    case DType::bfloat16:
      return "BF16";
    case DType::float16:
      return "F16";
    case DType::int8:
      return "I8";
    case DType::uint8:
      return "U8";
  }
  fail("the dtype ", static_cast<int>(dtype), " does not exist");
}

std::string dump(const Json& json, const char* what) {
  try {
    return json.dump();
  } catch (const Json::exception&) {
    fail(what, " is no valid UTF-8, as JSON demands");
  }
}

}  // namespace

struct SafetensorsWriter::Impl {
  std::map<std::string, Rows, std::less<>> tensors;
  std::map<std::string, std::string> metadata;

  void add(Rows tensor) {
    if (tensor.name == kMetadataKey) fail("name is ", kMetadataKey, ", which no tensor can have");
    dump(tensor.name, "name");
    if (tensors.contains(tensor.name)) fail("name is '", tensor.name, "', which another tensor has already");
    std::string name = tensor.name;
    tensors.emplace(std::move(name), std::move(tensor));
  }

  std::vector<const Rows*> in_order() const {
    std::vector<const Rows*> order;
    for (const auto& [name, tensor] : tensors) order.push_back(&tensor);
    std::ranges::sort(order, {}, [](const Rows* tensor) { return tensor->order(); });
    return order;
  }

  // The length and the header, padded so that the data begin on a cache line.
  std::string head(const std::vector<const Rows*>& order) const {
    Json header = Json::object();
    if (!metadata.empty()) header[std::string(kMetadataKey)] = metadata;
    std::uint64_t end = 0;
    for (const Rows* tensor : order) {
      const std::uint64_t begin = std::exchange(end, end + tensor->bytes());
      header[tensor->name] = {{"dtype", tensor->dtype}, {"shape", tensor->shape}, {"data_offsets", {begin, end}}};
    }
    std::string text = dump(header, "the metadata");
    text.resize((kHeaderLengthBytes + text.size() + kAlignment - 1) / kAlignment * kAlignment - kHeaderLengthBytes,
                ' ');
    if (text.size() > kMostHeaderBytes) {
      fail("names and metadata take ", text.size(), " bytes, expected at most ", kMostHeaderBytes);
    }
    std::string length;
    for (std::size_t i = 0; i < kHeaderLengthBytes; ++i) {
      length += static_cast<char>(std::uint64_t{text.size()} >> (8 * i));
    }
    return length + text;
  }

  template <class Write>
  void write_to(const Write& write) const {
    const std::vector<const Rows*> order = in_order();
    const std::string begin = head(order);
    write(std::as_bytes(std::span(begin)));
    for (const Rows* tensor : order) {
      for (std::size_t row = 0; row < tensor->rows; ++row) write(tensor->row(row));
    }
  }
};

SafetensorsWriter::SafetensorsWriter() : impl_(std::make_unique<Impl>()) {}
SafetensorsWriter::~SafetensorsWriter() = default;
SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&&) noexcept = default;
SafetensorsWriter& SafetensorsWriter::operator=(SafetensorsWriter&&) noexcept = default;

void SafetensorsWriter::add(std::string name, ConstMatrixView tensor) {
  check_view(tensor, name.c_str());
  const auto rows = static_cast<std::size_t>(tensor.rows), element = size_of(tensor.dtype);
  const std::size_t row_bytes = static_cast<std::size_t>(tensor.cols) * element;
  const bool contiguous = rows <= 1 || tensor.row_stride == tensor.cols;
  impl_->add({std::move(name),
              file_dtype(tensor.dtype),
              {tensor.rows, tensor.cols},
              static_cast<const std::byte*>(tensor.data),
              contiguous ? 1 : rows,
              contiguous ? rows * row_bytes : row_bytes,
              static_cast<std::size_t>(tensor.row_stride) * element});
}

void SafetensorsWriter::add(std::string name, ConstVectorView tensor) {
  check_view(tensor, name.c_str());
  const std::size_t bytes = static_cast<std::size_t>(tensor.size) * size_of(tensor.dtype);
  add(std::move(name), file_dtype(tensor.dtype), {tensor.size}, {static_cast<const std::byte*>(tensor.data), bytes});
}

void SafetensorsWriter::add(std::string name, std::string dtype, std::vector<std::int64_t> shape,
                            std::span<const std::byte> bytes) {
  check_span(bytes, name.c_str());
  const auto bits = dtype_bits(dtype);
  if (!bits) fail(name, " has the dtype '", dtype, "', which the format does not have");
  const auto count = element_count(shape);
  if (!count) fail(name, " has a shape with a negative size, or one that overflows");
  if (*count * *bits != std::uint64_t{bytes.size()} * 8) {
    fail(name, " has ", bytes.size(), " bytes, its shape and dtype take ", *count * *bits, " bits");
  }
  impl_->add({std::move(name), std::move(dtype), std::move(shape), bytes.data(), 1, bytes.size(), 0});
}

void SafetensorsWriter::set_metadata(std::string key, std::string value) {
  dump(key, "key");
  dump(value, "value");
  impl_->metadata[std::move(key)] = std::move(value);
}

void SafetensorsWriter::save(const std::string& path) const {
  OutputFile file(path);
  impl_->write_to([&](std::span<const std::byte> bytes) { file.write(bytes); });
  file.finish();
}

std::vector<std::byte> SafetensorsWriter::to_bytes() const {
  std::vector<std::byte> all;
  impl_->write_to([&](std::span<const std::byte> bytes) { all.insert(all.end(), bytes.begin(), bytes.end()); });
  return all;
}

}  // namespace bitcore
