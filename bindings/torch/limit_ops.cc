// What this machine can do at most, for `bitlab bench`. Threads are torch's.
#include <string>

#include "benchmarks/limits/limits.h"
#include "bitcore/exceptions.h"
#include "bitcore/torch_executor.h"
#include "ops.h"

namespace bitcore::torch_ops {
namespace {

constexpr std::int64_t kMostRepeats = 1'000'000;

const limits::MultiplyAdds& find(const std::string& name) {
  for (const limits::MultiplyAdds& loop : limits::multiply_adds()) {
    if (loop.name != name) continue;
    if (!loop.supported) throw QuantizationError("name is '" + name + "', which this CPU cannot run");
    return loop;
  }
  throw QuantizationError("name is '" + name + "', expected one that list_limits returns");
}

void require_positive(std::int64_t value, const char* name) {
  if (value < 1) throw QuantizationError(std::string(name) + " is " + std::to_string(value) + ", expected at least 1");
}

}  // namespace

std::string list_limits() {
  std::string json;
  for (const limits::MultiplyAdds& loop : limits::multiply_adds()) {
    json += std::string(json.empty() ? "" : ", ") + "{\"name\": \"" + std::string(loop.name) +
            "\", \"supported\": " + (loop.supported ? "true" : "false") +
            ", \"operations\": " + std::to_string(loop.operations) + "}";
  }
  return "[" + json + "]";
}

double measure_multiply_adds(StringArgument argument, std::int64_t rounds) {
  const limits::MultiplyAdds& loop = find(take_string(argument));
  require_positive(rounds, "rounds");
  return limits::operations_per_second(loop, torch_executor(), rounds);
}

double measure_read(const Tensor& bytes, std::int64_t streams, std::int64_t repeats) {
  if (bytes.scalar_type() != ScalarType::Byte || !bytes.is_contiguous()) {
    throw QuantizationError("bytes must be a contiguous uint8 tensor");
  }
  if (streams != 1 && streams != 2 && streams != 4 && streams != limits::kMostStreams) {
    throw QuantizationError("streams is " + std::to_string(streams) + ", expected 1, 2, 4 or 8");
  }
  require_positive(repeats, "repeats");
  Executor& executor = torch_executor();
  if (bytes.numel() < limits::least_bytes(executor, static_cast<int>(streams))) {
    throw QuantizationError("bytes has " + std::to_string(bytes.numel()) + " bytes, expected at least " +
                            std::to_string(limits::least_bytes(executor, static_cast<int>(streams))));
  }
  const std::span data(static_cast<const std::uint8_t*>(bytes.const_data_ptr()),
                       static_cast<std::size_t>(bytes.numel()));
  return limits::bytes_per_second(data, executor, static_cast<int>(streams), repeats);
}

double measure_round_trip(std::int64_t repeats) {
  require_positive(repeats, "repeats");
  if (repeats > kMostRepeats) {
    throw QuantizationError("repeats is " + std::to_string(repeats) + ", expected at most " +
                            std::to_string(kMostRepeats));
  }
  if (torch_executor().num_threads() < 2) {
    throw QuantizationError("torch has 1 thread, expected at least 2");
  }
  return limits::round_trip_seconds(torch_executor(), static_cast<int>(repeats));
}

}  // namespace bitcore::torch_ops
