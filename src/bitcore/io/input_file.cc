#include "bitcore/io/input_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "bitcore/base/checks.h"
#include "bitcore/io/path.h"

namespace bitcore {
namespace {

std::string reason(int error) { return std::generic_category().message(error); }

}  // namespace

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(const_cast<void*>(data_), size_);
}

InputFile::InputFile(const std::string& path) : path_(path) {
  check_path(path);
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) fail_file(path, "cannot be opened: ", reason(errno));
}

InputFile::~InputFile() { ::close(descriptor_); }

std::optional<Mapping> InputFile::map() const {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size <= 0) return std::nullopt;
  const auto size = static_cast<std::size_t>(status.st_size);
  const void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor_, 0);
  if (data == MAP_FAILED) return std::nullopt;
  return std::optional<Mapping>(std::in_place, data, size);
}

void InputFile::append_to(std::vector<std::byte>& bytes, std::size_t count) const {
  constexpr std::size_t kChunk = std::size_t{1} << 24;
  while (count > 0) {
    const std::size_t before = bytes.size(), wanted = std::min(count, kChunk);
    bytes.resize(before + wanted);
    const ssize_t got = ::read(descriptor_, bytes.data() + before, wanted);
    const int error = errno;
    bytes.resize(before + static_cast<std::size_t>(std::max<ssize_t>(got, 0)));
    if (got == 0) return;
    if (got < 0 && error != EINTR) fail_file(path_, "cannot be read: ", reason(error));
    count -= bytes.size() - before;
  }
}

}  // namespace bitcore
