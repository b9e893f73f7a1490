#include "bitmodels/json_file.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string_view>

#include "bitcore/base/checks.h"

namespace bitmodels {

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) bitcore::fail_file(path, "cannot be opened");
  try {
    return {std::istreambuf_iterator<char>(file), {}};
  } catch (const std::ios_base::failure&) {  // A directory, or a disk that fails.
    bitcore::fail_file(path, "cannot be read");
  }
}

bitcore::Json read_json_file(const std::string& path, int most_depth) {
  const std::string text = read_file(path);
  std::string_view object = text;
  if (object.starts_with("\xef\xbb\xbf")) object.remove_prefix(3);  // Some editors put a byte order mark first.
  object.remove_prefix(std::min(object.find_first_not_of(" \t\r\n"), object.size()));
  return bitcore::parse_json_object(object, path, "it", most_depth);
}

}  // namespace bitmodels
