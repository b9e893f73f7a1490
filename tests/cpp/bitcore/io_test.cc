// safetensors: a valid file, and every way in which one can be broken.
#include "bitcore/io.h"

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

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
    expect_error<QuantizationError>([&] { SafetensorsFile file(path_); }, parts);
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
  expect_error<QuantizationError>([&] { file.tensor("z"); }, {"'z'", path_});
  expect_error<QuantizationError>([&] { file.tensor("s").matrix(); }, {"0 dimensions", "2"});
  expect_error<QuantizationError>([&] { file.tensor("q").floats(); }, {"uint8", "float32"});
}

TEST_F(Safetensors, RefusesWhatIsNoFile) {
  expect_error<QuantizationError>([] { SafetensorsFile file("/nonexistent/model.safetensors"); }, {"/nonexistent"});
  expect_error<QuantizationError>([] { SafetensorsFile file("/"); }, {"regular"});
  write_raw("");
  expect_error<QuantizationError>([&] { SafetensorsFile file(path_); }, {"empty"});
  write_raw("short");
  expect_error<QuantizationError>([&] { SafetensorsFile file(path_); }, {"5 bytes", "8"});
  write_raw("GGUF and then a text that is no header length at all");
  expect_error<QuantizationError>([&] { SafetensorsFile file(path_); }, {"truncated"});
}

TEST_F(Safetensors, RefusesABrokenHeader) {
  expect_refused("{", 0, {"JSON"});
  expect_refused("[]", 0, {"object"});
  expect_refused(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1, {"'a'", "dtype"});
  expect_refused(R"({"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}})", 1, {"X9"});
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
      {"twice"});
}

TEST_F(Safetensors, RefusesDeepNesting) {
  const std::string deep = std::string(200000, '[') + std::string(200000, ']');
  expect_refused(R"({"x":{"dtype":)" + deep + R"(,"shape":[1],"data_offsets":[0,4]}})", 4, {"nested"});
  expect_refused(R"({"__metadata__":{"a":)" + deep + "}}", 0, {"nested"});
  expect_refused(deep, 0, {"nested"});
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
  expect_error<QuantizationError>([&] { file.tensor("z"); }, {"'z'", "embedded"});
  expect_error<QuantizationError>([&] { SafetensorsFile::from_bytes({}, "embedded"); }, {"embedded", "0 bytes", "8"});
  expect_error<QuantizationError>([&] { SafetensorsFile::from_bytes(bytes.first(bytes.size() - 1), "embedded"); },
                                  {"embedded", "truncated"});
}

TEST_F(Safetensors, EveryTruncationIsRefused) {
  const std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  write(header, 8);
  std::ifstream in(path_, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  for (std::size_t length = 0; length < whole.size(); ++length) {
    write_raw(whole.substr(0, length));
    EXPECT_THROW(SafetensorsFile file(path_), QuantizationError) << length;
  }
}

}  // namespace
}  // namespace bitcore
