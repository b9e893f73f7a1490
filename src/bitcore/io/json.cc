#include "bitcore/io/json.h"

#include <cmath>
#include <functional>
#include <set>
#include <vector>

#include "bitcore/base/checks.h"

namespace bitcore {
namespace {

// Watches a text while it is parsed: how deep it is nested, and whether an object has two equal keys, of which the
// parser would silently keep the last.
class ParseWatch {
 public:
  ParseWatch(const std::string& path, const std::string& what, int most_depth)
      : path_(path), what_(what), most_depth_(most_depth) {}

  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > most_depth_) fail_file(path_, what_, " is nested more than ", most_depth_, " deep");
    if (event == Json::parse_event_t::object_start) keys_.emplace_back();
    if (event == Json::parse_event_t::object_end) keys_.pop_back();
    if (event == Json::parse_event_t::key) note_key(parsed.get<std::string>());
    return true;
  }
  void fail_if_repeated() const {
    if (repeated_) fail_file(path_, what_, " names '", *repeated_, "' twice");
  }

 private:
  void note_key(const std::string& key) {
    if (!keys_.back().insert(key).second) repeated_ = key;
  }

  const std::string& path_;
  const std::string& what_;
  int most_depth_;
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
  std::optional<std::string> repeated_;
};

}  // namespace

Json parse_json_object(std::string_view text, const std::string& path, const std::string& what, int most_depth) {
  if (!text.starts_with('{')) fail_file(path, what, " is no JSON object: it does not begin with a brace");
  // The parser takes a null character for the end.
  if (text.find('\0') != std::string_view::npos) fail_file(path, what, " is no valid JSON: it has a null character");
  ParseWatch watch(path, what, most_depth);
  Json object;
  try {
    object = Json::parse(text.begin(), text.end(), std::ref(watch));
  } catch (const Json::exception& error) {
    fail_file(path, what, " is no valid JSON: ", error.what());
  }
  watch.fail_if_repeated();
  return object;
}

std::optional<std::uint64_t> unsigned_integer(const Json& value) {
  if (value.is_number_unsigned()) return value.get<std::uint64_t>();
  if (value.is_number_integer()) {
    const auto integer = value.get<std::int64_t>();
    return integer >= 0 ? std::optional(static_cast<std::uint64_t>(integer)) : std::nullopt;
  }
  if (!value.is_number_float()) return std::nullopt;
  constexpr double kFirstInexact = 9007199254740992.0;  // 2^53, which 2^53 + 1 is read as, too
  const auto number = value.get<double>();
  if (!(number >= 0 && number < kFirstInexact) || number != std::floor(number)) return std::nullopt;
  return static_cast<std::uint64_t>(number);
}

}  // namespace bitcore
