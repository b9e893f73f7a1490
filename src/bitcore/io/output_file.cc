#include "bitcore/io/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <random>
#include <system_error>

#include "bitcore/base/checks.h"
#include "bitcore/io/path.h"

namespace bitcore {
namespace {

// Less than this is collected before it is written.
constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

// Random: threads share a process id, and so do processes of different containers on one file system.
std::string random_hex() {
  constexpr char kDigits[] = "0123456789abcdef";
  std::random_device random;
  std::string text;
  for (int digit = 0; digit < 16; ++digit) text += kDigits[random() % 16];
  return text;
}

std::string temporary_beside(const std::string& path) {
  constexpr std::size_t kMostOfName = 200;  // a name has up to 255 bytes
  const std::filesystem::path whole(path);
  const std::string name = whole.filename().string().substr(0, kMostOfName);
  return (whole.parent_path() / ("." + name + "." + random_hex() + ".tmp")).string();
}

bool is_special(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode);
}

// The new name itself must outlive a crash. A file system that cannot promise it is still written.
void sync_directory_of(const std::string& path) {
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  const int directory = ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return;
  ::fsync(directory);
  ::close(directory);
}

}  // namespace

OutputFile::OutputFile(const std::string& path) : path_(path) {
  check_path(path);
  if (is_special(path)) {
    descriptor_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
  } else {
    do {
      temporary_ = temporary_beside(path);
      descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (descriptor_ < 0 && errno == EEXIST);
  }
  if (descriptor_ < 0) fail_to_write(errno);
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (descriptor_ >= 0 && !temporary_.empty()) ::unlink(temporary_.c_str());
}

void OutputFile::write(std::span<const std::byte> bytes) {
  if (buffer_.size() + bytes.size() > kBufferBytes) flush();
  if (bytes.size() > kBufferBytes) {
    write_now(bytes);
  } else {
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  }
}

void OutputFile::finish() {
  flush();
  // EINVAL: a pipe or a device, which keeps nothing.
  if (::fsync(descriptor_) != 0 && errno != EINVAL) fail_to_write(errno);
  if (temporary_.empty()) return;
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_to_write(errno);
  temporary_.clear();
  sync_directory_of(path_);
}

void OutputFile::flush() {
  write_now(buffer_);
  buffer_.clear();
}

void OutputFile::write_now(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno != EINTR) fail_to_write(errno);
    bytes = bytes.subspan(static_cast<std::size_t>(written < 0 ? 0 : written));
  }
}

void OutputFile::fail_to_write(int error) const {
  fail_file(path_, "cannot be written: ", std::generic_category().message(error));
}

}  // namespace bitcore
