// Runs a saved BitMLP over a batch, with no Python.
//
//   run_bitmlp MODEL INPUT OUTPUT [--threads N] [--kernel NAME]
//
// MODEL   what save_pretrained() wrote: the directory, or the model.safetensors in it; deployed or not.
// INPUT   a safetensors file whose tensor "x" is (rows, in_channels), float32, bfloat16 or float16.
// OUTPUT  a safetensors file that will hold "y", (rows, out_channels), of the dtype of x.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bitcore/executor.h"
#include "bitcore/io.h"
#include "bitcore/kernels/registry.h"
#include "bitcore/tensor.h"
#include "bitmodels/mlp.h"

namespace {

constexpr std::string_view kUsage = "usage: run_bitmlp MODEL INPUT OUTPUT [--threads N] [--kernel NAME]";

struct Arguments {
  std::vector<std::string> paths;
  int threads = 1;
  std::string kernel;
};

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

int parse_threads(const std::string& text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) {
    fail("--threads is \"" + text + "\", expected an integer of at least 1");
  }
  return static_cast<int>(std::min<std::int64_t>(value, bitcore::ThreadPool::kMostThreads));
}

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments arguments;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const bool is_option = words[i] == "--threads" || words[i] == "--kernel";
    if (is_option && i + 1 == words.size()) fail(words[i] + " needs a value\n" + std::string(kUsage));
    if (words[i] == "--threads") {
      arguments.threads = parse_threads(words[++i]);
    } else if (words[i] == "--kernel") {
      arguments.kernel = words[++i];
    } else if (words[i].starts_with("--")) {
      fail("unknown option " + words[i] + "\n" + std::string(kUsage));
    } else {
      arguments.paths.push_back(words[i]);
    }
  }
  if (arguments.paths.size() != 3) fail(std::string(kUsage));
  return arguments;
}

void print_summary(const bitmodels::BitMLPModel& model, std::int64_t rows, const Arguments& arguments,
                   double microseconds) {
  const bitcore::BitQuantConfig& config = model.layers().front().config();
  const auto kernel = arguments.kernel.empty() ? bitcore::KernelRegistry::get_kernel_for_config(config)
                                               : bitcore::KernelRegistry::get_kernel_by_name(arguments.kernel, config);
  std::cout << rows << " rows through " << model.layers().size() << " layers in " << std::lround(microseconds)
            << " us: " << kernel->name() << ", threads: " << arguments.threads << "\n";
}

void run_program(const Arguments& arguments) {
  bitcore::ThreadPool executor(arguments.threads);
  const auto model = bitmodels::BitMLPModel::from_pretrained(arguments.paths[0], executor);
  const bitcore::SafetensorsFile input(arguments.paths[1]);
  const bitcore::ConstMatrixView x = input.tensor("x").matrix();
  const std::int64_t cols = model.config().out_channels;
  std::vector<std::byte> memory(static_cast<std::size_t>(x.rows * cols) * bitcore::size_of(x.dtype));
  const bitcore::MatrixView y(memory.data(), x.dtype, x.rows, cols, cols);

  const auto start = std::chrono::steady_clock::now();
  model.forward(x, y, {.executor = &executor, .kernel = arguments.kernel});
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;

  bitcore::SafetensorsWriter output;
  output.add("y", y);
  output.save(arguments.paths[2]);
  print_summary(model, x.rows, arguments, elapsed.count());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run_program(parse_arguments({argv + 1, argv + argc}));
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "run_bitmlp: " << error.what() << "\n";
    return 1;
  }
}
