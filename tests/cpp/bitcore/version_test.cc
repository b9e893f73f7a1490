// The one header with everything, alone; and the version that it states.
#include <gtest/gtest.h>

#include <string>

#include "bitcore/bitcore.h"

namespace bitcore {
namespace {

TEST(Version, OfTheLibraryIsThatOfTheHeaders) {
  EXPECT_EQ(version(), std::to_string(BITCORE_VERSION_MAJOR) + "." + std::to_string(BITCORE_VERSION_MINOR) + "." +
                           std::to_string(BITCORE_VERSION_PATCH));
}

}  // namespace
}  // namespace bitcore
