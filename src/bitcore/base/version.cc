#include "bitcore/version.h"

namespace bitcore {
namespace {

#define BITCORE_TEXT_OF(number) #number
#define BITCORE_TEXT(number) BITCORE_TEXT_OF(number)
constexpr std::string_view kVersion =
    BITCORE_TEXT(BITCORE_VERSION_MAJOR) "." BITCORE_TEXT(BITCORE_VERSION_MINOR) "." BITCORE_TEXT(BITCORE_VERSION_PATCH);
static_assert(kVersion == BITCORE_PROJECT_VERSION, "bitcore/version.h and CMakeLists.txt differ");

}  // namespace

std::string_view version() { return kVersion; }

}  // namespace bitcore
