// safetensors: a valid file, and every way in which one can be broken.
#include "bitcore/io.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "support.h"

namespace bitcore {
namespace {

using testing::expect_error;

class Safetensors : public ::testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }

  // Writes a file with this header and `data_bytes` bytes 0, 1, 2, ... behind it.
  const std::string& write(const std::string& header, std::size_t data_bytes) {
    std::string file(8, '\0');
    for (std::size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(header.size() >> (8 * i));
    file += header;
    for (std::size_t i = 0; i < data_bytes; ++i) file += static_cast<char>(i);
    return write_raw(file);
  }

  const std::string& write_raw(const std::string& bytes) {
    std::ofstream(path_, std::ios::binary) << bytes;
    return path_;
  }

  void expect_refused(const std::string& header, std::size_t data_bytes, const std::vector<std::string>& parts) {
    write(header, data_bytes);
    expect_error<FileError>([&] { SafetensorsFile file(path_); }, parts);
  }

  const std::string path_ =
      (std::filesystem::temp_directory_path() /
       ("bitcore-io-" + std::string(::testing::UnitTest::GetInstance()->current_test_info()->name()) + ".safetensors"))
          .string();
};

TEST_F(Safetensors, ReadsTensorsAndMetadata) {
  const SafetensorsFile file(write(R"({"__metadata__":{"a":"b"},"q":{"dtype":"U8","shape":[2,3],"data_offsets":[0,6]},)"
                                   R"("s":{"dtype":"F32","shape":[],"data_offsets":[6,10]}})",
                                   10));
  EXPECT_EQ(file.metadata().at("a"), "b");
  ASSERT_TRUE(file.contains("q"));
  EXPECT_FALSE(file.contains("z"));
  const ConstMatrixView q = file.tensor("q").matrix();
  EXPECT_EQ(q.rows, 2);
  EXPECT_EQ(q.cols, 3);
  EXPECT_EQ(static_cast<int>(q.row(1)[2]), 5);
  const std::uint8_t scale[4] = {6, 7, 8, 9};
  float expected;
  std::memcpy(&expected, scale, 4);
  EXPECT_EQ(file.tensor("s").floats(), std::vector<float>{expected});
  EXPECT_EQ(file.tensor("s").vector().size, 1);
  EXPECT_EQ(file.tensors().size(), 2u);
  expect_error<FileError>([&] { file.tensor("z"); }, {"'z'", path_});
  expect_error<FileError>([&] { file.tensor("s").matrix(); }, {"0 dimensions", "2"});
  expect_error<FileError>([&] { file.tensor("q").floats(); }, {"U8", "F32"});
}

TEST_F(Safetensors, ATensorMayBeEmpty) {
  for (const char* dtype : {"F32", "F16", "BF16"}) {
    const std::string header = std::string(R"({"e":{"dtype":")") + dtype + R"(","shape":[0,3],"data_offsets":[0,0]}})";
    const SafetensorsFile file(write(header, 0));
    EXPECT_TRUE(file.tensor("e").floats().empty());
    EXPECT_EQ(file.tensor("e").matrix().cols, 3);
  }
}

TEST_F(Safetensors, RefusesWhatIsNoFile) {
  expect_error<FileError>([] { SafetensorsFile file("/nonexistent/model.safetensors"); }, {"/nonexistent"});
  expect_error<FileError>([] { SafetensorsFile file("/"); }, {"/: ", "directory"});
  write_raw("");
  expect_error<FileError>([&] { SafetensorsFile file(path_); }, {"empty"});
  write_raw("short");
  expect_error<FileError>([&] { SafetensorsFile file(path_); }, {"5 bytes", "8"});
  write_raw("GGUF and then a text that is no header length at all");
  expect_error<FileError>([&] { SafetensorsFile file(path_); }, {"no safetensors file"});
}

TEST_F(Safetensors, RefusesABrokenHeader) {
  expect_refused("{", 0, {"JSON"});
  expect_refused("[]", 0, {"object"});
  expect_refused("", 0, {"object"});
  expect_refused(" {}", 0, {"brace"});
  expect_refused("\xef\xbb\xbf{}", 0, {"brace"});
  expect_refused("{}{}", 0, {"JSON"});
  expect_refused(std::string("{}\0 ", 4), 0, {"null character"});
  expect_refused("{\"\xff\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, {"JSON"});
  expect_refused(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1, {"'a'", "dtype"});
  expect_refused(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}})", 1, {"1 bytes", "2"});
  expect_refused(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 1, {"truncated"});
  expect_refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1, {"1 to 0"});
  expect_refused(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, {"-1"});
  expect_refused(R"({"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1, {"1.5"});
  expect_refused(R"({"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,1]}})", 1, {"overflow"});
  expect_refused(R"({"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", 1, {"list"});
  expect_refused(R"({"a":3})", 1, {"'a'"});
  expect_refused(R"({"__metadata__":{"a":1}})", 0, {"__metadata__"});
  expect_refused(
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2,
      {"'a'", "twice"});
  expect_refused(R"({"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1, {"'dtype'", "twice"});
  expect_refused(R"({"__metadata__":{"k":"1","k":"2"}})", 0, {"'k'", "twice"});
}

std::string bytes_entry(const std::string& name, int begin, int end) {
  return "\"" + name + R"(":{"dtype":"U8","shape":[)" + std::to_string(end - begin) + R"(],"data_offsets":[)" +
         std::to_string(begin) + "," + std::to_string(end) + "]}";
}

TEST_F(Safetensors, EveryByteBelongsToOneTensor) {
  const auto header = [](const std::vector<std::string>& entries) {
    std::string text;
    for (const std::string& entry : entries) text += (text.empty() ? "{" : ",") + entry;
    return text + "}";
  };
  SafetensorsFile(write(header({bytes_entry("b", 0, 2), bytes_entry("a", 2, 6), bytes_entry("empty", 2, 2)}), 6));
  expect_refused(header({bytes_entry("a", 0, 4)}), 8, {"take 4 bytes", "4 follow"});
  expect_refused("{}", 1, {"take 0 bytes", "1 follow"});
  expect_refused(header({bytes_entry("a", 2, 6)}), 6, {"0 to 2", "no tensor"});
  expect_refused(header({bytes_entry("a", 0, 2), bytes_entry("b", 3, 6)}), 6, {"2 to 3", "no tensor"});
  expect_refused(header({bytes_entry("a", 0, 4), bytes_entry("b", 2, 6)}), 6, {"'b'", "byte 2", "ends at 4"});
  expect_refused(header({bytes_entry("a", 0, 4), bytes_entry("b", 0, 4)}), 4, {"'b'", "byte 0", "ends at 4"});
  expect_refused(header({bytes_entry("a", 0, 4), bytes_entry("empty", 2, 2)}), 4, {"byte 2"});
}

TEST_F(Safetensors, ListsTensorsOfOtherDtypes) {
  const SafetensorsFile file(write(R"({"f4":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]},)"
                                   R"("f6":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[2,5]},)"
                                   R"("f8":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[5,6]},)"
                                   R"("c":{"dtype":"C64","shape":[1],"data_offsets":[6,14]},)"
                                   R"("new":{"dtype":"Q7_NEW","shape":[3,2],"data_offsets":[14,15]},)"
                                   R"("q":{"dtype":"I8","shape":[1,1],"data_offsets":[15,16]}})",
                                   16));
  EXPECT_EQ(file.tensors().size(), 6u);
  EXPECT_EQ(static_cast<int>(*file.tensor("q").matrix().row(0)), 15);
  EXPECT_EQ(file.tensor("new").dtype, "Q7_NEW");
  EXPECT_EQ(file.tensor("new").numel(), 6);
  EXPECT_EQ(static_cast<int>(file.tensor("new").bytes[0]), 14);
  expect_error<FileError>([&] { file.tensor("new").matrix(); }, {path_, "'new'", "Q7_NEW"});
  expect_error<FileError>([&] { file.tensor("f8").vector(); }, {"'f8'", "F8_E8M0"});
  expect_error<FileError>([&] { file.tensor("c").floats(); }, {"'c'", "C64"});
  expect_refused(R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}})", 2, {"12 bits"});
  expect_refused(R"({"a":{"dtype":"C64","shape":[1],"data_offsets":[0,4]}})", 4, {"4 bytes", "8"});
}

TEST_F(Safetensors, NumbersAsOtherWritersWriteThem) {
  const SafetensorsFile file(write(R"({"a":{"dtype":"U8","shape":[2.0,3e0],"data_offsets":[-0,0.6e1]}})", 6));
  EXPECT_EQ(file.tensor("a").shape, (std::vector<std::int64_t>{2, 3}));
  for (const char* number : {"1e300", "9007199254740993.0", "-1.0", "0.5", "\"1\"", "true", "null"}) {
    expect_refused(R"({"a":{"dtype":"U8","shape":[)" + std::string(number) + R"(],"data_offsets":[0,1]}})", 1,
                   {"a size of tensor 'a'"});
  }
}

// A pipe has no size and cannot be mapped.
class Pipe {
 public:
  explicit Pipe(std::string content) {
    if (::pipe(ends_) != 0) throw std::runtime_error("pipe");
    writer_ = std::thread([this, text = std::move(content)] {
      for (std::size_t at = 0; at < text.size();) {
        const ssize_t written = ::write(ends_[1], text.data() + at, text.size() - at);
        if (written <= 0) break;
        at += static_cast<std::size_t>(written);
      }
      ::close(ends_[1]);
    });
  }
  ~Pipe() {
    ::close(ends_[0]);
    writer_.join();
  }
  std::string path() const { return "/proc/self/fd/" + std::to_string(ends_[0]); }

 private:
  int ends_[2] = {};
  std::thread writer_;
};

TEST_F(Safetensors, ReadsWhatCannotBeMapped) {
  constexpr int kBytes = 200000;  // more than a pipe holds
  write("{" + bytes_entry("q", 0, kBytes) + "}", kBytes);
  std::ifstream in(path_, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const auto open = [](const std::string& content) { return SafetensorsFile(Pipe(content).path()); };
  const SafetensorsFile file = open(whole);
  EXPECT_EQ(static_cast<int>(file.tensor("q").bytes[kBytes - 1]), (kBytes - 1) % 256);
  expect_error<FileError>([&] { open(whole.substr(0, 5)); }, {"5 bytes"});
  expect_error<FileError>([&] { open(whole.substr(0, 20)); }, {"12 follow"});
  expect_error<FileError>([&] { open(whole.substr(0, whole.size() - 1)); }, {"200000", "199999", "truncated"});
  expect_error<FileError>([] { SafetensorsFile("/dev/zero"); }, {"/dev/zero: ", "object"});  // it never ends
  expect_error<FileError>([] { SafetensorsFile("/dev/null"); }, {"/dev/null: ", "empty"});
  expect_error<FileError>([] { SafetensorsFile("/proc/self/status"); }, {"no safetensors file"});
}

TEST_F(Safetensors, WhatFollowsInAPipeIsRefused) {
  write("{" + bytes_entry("q", 0, 4) + "}", 5);
  std::ifstream in(path_, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  expect_error<FileError>([&] { SafetensorsFile(Pipe(whole).path()); }, {"take 4 bytes", "more follow"});
}

TEST(SafetensorsBytes, NullIsAnArgumentsError) {
  const std::span<const std::byte> null(static_cast<const std::byte*>(nullptr), 8);
  expect_error<QuantizationError>([&] { SafetensorsFile::from_bytes(null, "embedded"); }, {"bytes is null", "8"});
}

TEST_F(Safetensors, RefusesDeepNesting) {
  const std::string deep = std::string(200000, '[') + std::string(200000, ']');
  expect_refused(R"({"x":{"dtype":)" + deep + R"(,"shape":[1],"data_offsets":[0,4]}})", 4, {"nested"});
  expect_refused(R"({"__metadata__":{"a":)" + deep + "}}", 0, {"nested"});
  expect_refused("{\"a\":" + deep + "}", 0, {"nested"});
  expect_refused(R"({"a":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]}})", 0, {"overflow"});
}

TEST_F(Safetensors, AlignsWhatTheFileDoesNot) {
  const SafetensorsFile file(write(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                                   R"("b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}})",
                                   11));
  const ConstVectorView b = file.tensor("b").vector();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.data) % alignof(float), 0u);
  EXPECT_EQ(static_cast<const std::uint8_t*>(b.data)[7], 10);
  EXPECT_EQ(file.tensor("b").floats(),
            std::vector<float>(static_cast<const float*>(b.data), static_cast<const float*>(b.data) + 2));
}

TEST_F(Safetensors, BytesInMemoryReadAsTheFile) {
  write(R"({"__metadata__":{"a":"b"},"q":{"dtype":"U8","shape":[2,3],"data_offsets":[0,6]}})", 6);
  std::ifstream in(path_, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const auto bytes = std::as_bytes(std::span(whole));
  SafetensorsFile file = SafetensorsFile::from_bytes(bytes, "embedded");
  file = SafetensorsFile::from_bytes(bytes, "embedded");
  EXPECT_EQ(file.metadata(), SafetensorsFile(path_).metadata());
  EXPECT_EQ(file.tensor("q").matrix().row(1)[2], SafetensorsFile(path_).tensor("q").matrix().row(1)[2]);
  expect_error<FileError>([&] { file.tensor("z"); }, {"'z'", "embedded"});
  expect_error<FileError>([&] { SafetensorsFile::from_bytes({}, "embedded"); }, {"embedded", "0 bytes", "8"});
  expect_error<FileError>([&] { SafetensorsFile::from_bytes(bytes.first(bytes.size() - 1), "embedded"); },
                          {"embedded", "truncated"});
}

TEST_F(Safetensors, EveryTruncationIsRefused) {
  const std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  write(header, 8);
  std::ifstream in(path_, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  for (std::size_t length = 0; length < whole.size(); ++length) {
    write_raw(whole.substr(0, length));
    EXPECT_THROW(SafetensorsFile file(path_), FileError) << length;
  }
}

}  // namespace
}  // namespace bitcore
