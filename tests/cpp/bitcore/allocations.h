// What the test program allocates: counted, and refused on demand.
#pragma once

#include <atomic>
#include <cstdint>

namespace bitcore::testing {

/// Calls of operator new so far, on all threads.
inline std::atomic<std::int64_t> allocations{0};

/// So many more allocations succeed, then one throws std::bad_alloc; negative: all succeed.
inline std::atomic<std::int64_t> allocations_until_failure{-1};

}  // namespace bitcore::testing
