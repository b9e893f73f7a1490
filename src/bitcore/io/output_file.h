// A file that appears under its name when it is complete, or not at all.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace bitcore {

/// Writes beside the path under a name that nobody else has, and then takes the path's place: a reader never sees half
/// a file, what had the name before stays until then, and of concurrent writers one wins whole. What is no regular file
/// (a pipe, a device) is written directly.
class OutputFile {
 public:
  /// @throws FileError where no file can be made there.
  explicit OutputFile(const std::string& path);
  /// Removes what has not been finished.
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  /// @throws FileError, as on a full disk.
  void write(std::span<const std::byte> bytes);

  /// Waits until the bytes are on the disk and gives the file its name.
  /// @throws FileError
  void finish();

 private:
  void flush();
  void write_now(std::span<const std::byte> bytes);
  [[noreturn]] void fail_to_write(int error) const;

  const std::string path_;
  std::string temporary_;  // empty: the path itself is written, or the file is finished
  int descriptor_ = -1;
  std::vector<std::byte> buffer_;
};

}  // namespace bitcore
