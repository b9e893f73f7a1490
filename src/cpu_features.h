// What this CPU and its operating system can run.
#pragma once

namespace bitcore {

/// AVX-512 F, BW, DQ, VL and VNNI, state saved by the operating system.
bool cpu_has_avx512_vnni();

}  // namespace bitcore
