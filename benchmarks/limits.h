// The machine's own limits, measured in the same run as the kernels that are compared with them.
#pragma once

#include <cstdint>
#include <span>

namespace bitcore::benchmarks {

/// Reads every byte once (16-byte aligned, a multiple of 128 bytes); returns something that depends on all of them.
std::uint64_t read_all(std::span<const std::uint8_t> bytes);

/// Whether vnni_multiply_adds runs on this CPU.
bool has_vnni();

/// Independent vpdpbusd instructions on registers only. Returns multiply-adds done.
std::int64_t vnni_multiply_adds(std::int64_t rounds);

}  // namespace bitcore::benchmarks
