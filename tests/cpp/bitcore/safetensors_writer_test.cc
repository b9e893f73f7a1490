// What SafetensorsWriter writes, and what stays when it cannot. The Python package reads its files in
// tests/python/bitcore/test_safetensors_files.py.
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "bitcore/io.h"
#include "support.h"

namespace bitcore {
namespace {

namespace fs = std::filesystem;
using testing::expect_error;

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

class Writer : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_)) names.push_back(entry.path().filename().string());
    return names;
  }

  // A writer of one tensor whose bytes are all `value`.
  SafetensorsWriter filled_with(std::uint8_t value, std::int64_t bytes = 3000) {
    values_.assign(static_cast<std::size_t>(bytes), value);
    SafetensorsWriter writer;
    writer.add("q", ConstMatrixView(values_.data(), 1, bytes));
    return writer;
  }

  const fs::path folder_ =
      fs::temp_directory_path() /
      ("bitcore-writer-" + std::string(::testing::UnitTest::GetInstance()->current_test_info()->name()));
  const std::string path_ = (folder_ / "model.safetensors").string();
  std::vector<std::uint8_t> values_;
};

TEST_F(Writer, WhatWasWrittenIsRead) {
  const testing::Floats floats = testing::random_floats(12, 1);
  const std::uint16_t halves[] = {1, 2, 3};
  const std::int64_t integer = -5;
  SafetensorsWriter writer;
  writer.set_metadata("quote\" and \u00e9", "line\nbreak");
  writer.set_metadata("key", "old");
  writer.set_metadata("key", "new");
  writer.add("whole", ConstMatrixView(floats.data(), 3, 4));
  writer.add("part", ConstMatrixView(floats.data() + 1, DType::float32, 3, 2, 4));
  writer.add("vector", ConstVectorView(halves, DType::bfloat16, 3));
  writer.add("scalar", "I64", {}, std::as_bytes(std::span(&integer, 1)));
  writer.add("empty", "F16", {0, 7}, {});
  writer.save(path_);

  const SafetensorsFile file(path_);
  EXPECT_EQ(file.metadata().at("quote\" and \u00e9"), "line\nbreak");
  EXPECT_EQ(file.metadata().at("key"), "new");
  EXPECT_EQ(file.tensors().size(), 5u);
  EXPECT_EQ(file.tensor("whole").floats(), floats);
  const testing::Floats part{floats[1], floats[2], floats[5], floats[6], floats[9], floats[10]};
  EXPECT_EQ(file.tensor("part").floats(), part);
  EXPECT_EQ(file.tensor("part").shape, (std::vector<std::int64_t>{3, 2}));
  EXPECT_EQ(file.tensor("vector").dtype, "BF16");
  EXPECT_EQ(std::memcmp(file.tensor("vector").bytes.data(), halves, sizeof(halves)), 0);
  EXPECT_EQ(file.tensor("scalar").shape, std::vector<std::int64_t>());
  EXPECT_EQ(std::memcmp(file.tensor("scalar").bytes.data(), &integer, sizeof(integer)), 0);
  EXPECT_EQ(file.tensor("empty").shape, (std::vector<std::int64_t>{0, 7}));

  const std::vector<std::byte> bytes = writer.to_bytes();
  EXPECT_EQ(read_file(path_), std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  EXPECT_EQ(files(), std::vector<std::string>{"model.safetensors"});
}

TEST_F(Writer, AFileWithoutTensors) {
  SafetensorsWriter().save(path_);
  EXPECT_TRUE(SafetensorsFile(path_).tensors().empty());
  EXPECT_EQ(fs::file_size(path_), 64u);
}

// Whatever the names are, whole cache lines begin on one, and the others on a multiple of their element's size.
TEST_F(Writer, TensorsAreAligned) {
  const std::vector<std::byte> zeros(1000);
  const auto bytes = [&](std::size_t count) { return std::span(zeros).first(count); };
  SafetensorsWriter writer;
  for (int length = 0; length < 70; ++length) {
    const std::string name = std::string(static_cast<std::size_t>(length), 'n') + std::to_string(length);
    writer.add("a" + name, "U8", {length}, bytes(static_cast<std::size_t>(length)));
    writer.add("b" + name, "F32", {16, length % 5}, bytes(static_cast<std::size_t>(64 * (length % 5))));
    writer.add("c" + name, "F16", {length}, bytes(static_cast<std::size_t>(2 * length)));
    writer.add("d" + name, "F64", {length % 9}, bytes(static_cast<std::size_t>(8 * (length % 9))));
    writer.add("e" + name, "F4", {2, length}, bytes(static_cast<std::size_t>(length)));
    writer.save(path_);
    const SafetensorsFile file(path_);
    for (const auto& [key, entry] : file.tensors()) {
      const std::size_t element = key[0] == 'c' ? 2 : key[0] == 'd' ? 8 : 1;
      const std::size_t alignment = entry.bytes.size() % 64 == 0 ? 64 : element;
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(entry.bytes.data()) % alignment, 0u) << key;
    }
  }
}

TEST_F(Writer, RefusesWhatNoFileCanHold) {
  SafetensorsWriter writer;
  const float values[6] = {};
  writer.add("a", ConstVectorView(values, 6));
  const auto bytes = std::as_bytes(std::span(values));
  expect_error<QuantizationError>([&] { writer.add("a", ConstVectorView(values, 6)); }, {"'a'"});
  expect_error<QuantizationError>([&] { writer.add("__metadata__", ConstVectorView(values, 6)); }, {"__metadata__"});
  expect_error<QuantizationError>([&] { writer.add("\xff", ConstVectorView(values, 6)); }, {"name", "UTF-8"});
  expect_error<QuantizationError>([&] { writer.set_metadata("\xff", "x"); }, {"key", "UTF-8"});
  expect_error<QuantizationError>([&] { writer.set_metadata("x", "\xff"); }, {"value", "UTF-8"});
  expect_error<QuantizationError>([&] { writer.add("b", "X9", {6}, bytes); }, {"b", "'X9'"});
  expect_error<QuantizationError>([&] { writer.add("b", "F32", {5}, bytes); }, {"b", "24 bytes", "160 bits"});
  expect_error<QuantizationError>([&] { writer.add("b", "F4", {47}, bytes); }, {"b", "24 bytes", "188 bits"});
  expect_error<QuantizationError>([&] { writer.add("b", "F32", {-6}, bytes); }, {"b", "negative"});
  expect_error<QuantizationError>(
      [&] {
        writer.add("b", "F32", {std::int64_t{1} << 40, std::int64_t{1} << 40}, bytes);
      },
      {"b", "overflows"});
  expect_error<QuantizationError>([&] { writer.add("b", ConstMatrixView(static_cast<float*>(nullptr), 2, 3)); },
                                  {"b is null"});
  expect_error<QuantizationError>([&] { writer.add("b", ConstVectorView(nullptr, 2)); }, {"b is null"});
  expect_error<QuantizationError>([&] { writer.save(""); }, {"path is empty"});
  expect_error<QuantizationError>([&] { writer.save(std::string("a\0b", 3)); }, {"null character"});
  writer.save(path_);
  EXPECT_EQ(SafetensorsFile(path_).tensors().size(), 1u);
}

TEST_F(Writer, WhereNoFileCanBe) {
  expect_error<FileError>([&] { filled_with(1).save((folder_ / "no" / "file").string()); }, {"no/file: ", "written"});
  expect_error<FileError>([&] { filled_with(1).save(folder_.string()); }, {"written", "directory"});
  expect_error<FileError>([&] { filled_with(1).save("/dev/full"); }, {"/dev/full: ", "No space"});
  filled_with(1).save("/dev/null");
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  const std::string long_name(255, 'n');
  filled_with(1).save((folder_ / long_name).string());
  EXPECT_EQ(files(), std::vector<std::string>{long_name});
}

// The process may write no file beyond a size: what a full disk does, without one.
TEST_F(Writer, AFailureLosesNothing) {
  filled_with(1).save(path_);
  const std::string before = read_file(path_);
  const SafetensorsWriter large = filled_with(2, 5'000'000);
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1'000'000, limit.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  expect_error<FileError>([&] { large.save(path_); }, {path_, "File too large"});
  ::setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(read_file(path_), before);
  EXPECT_EQ(files(), std::vector<std::string>{"model.safetensors"});
}

TEST_F(Writer, AMappedFileCanBeReplaced) {
  filled_with(1).save(path_);
  const SafetensorsFile old(path_);
  filled_with(2).save(path_);
  EXPECT_EQ(static_cast<int>(old.tensor("q").bytes[0]), 1);
  EXPECT_EQ(static_cast<int>(SafetensorsFile(path_).tensor("q").bytes[0]), 2);
}

TEST_F(Writer, TheFileHasTheRightsOfAnyNewFile) {
  const mode_t mask = ::umask(022);
  filled_with(1).save(path_);
  ::umask(mask);
  struct stat status {};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777u, 0644u);
}

TEST_F(Writer, OfConcurrentSavesOneWins) {
  constexpr int kThreads = 4, kSaves = 5;
  filled_with(0).save(path_);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      const std::vector<std::uint8_t> values(500'000, static_cast<std::uint8_t>(thread + 1));
      SafetensorsWriter writer;
      writer.add("q", ConstMatrixView(values.data(), 1, static_cast<std::int64_t>(values.size())));
      for (int save = 0; save < kSaves; ++save) {
        writer.save(path_);
        const SafetensorsFile file(path_);
        const auto bytes = file.tensor("q").bytes;
        EXPECT_EQ(std::count(bytes.begin(), bytes.end(), bytes[0]), static_cast<std::ptrdiff_t>(bytes.size()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(files(), std::vector<std::string>{"model.safetensors"});
}

}  // namespace
}  // namespace bitcore
