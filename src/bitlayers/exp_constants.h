// The constants of the engine's exp; its sequence of operations stands in exp-inl.h.
#pragma once

namespace bitlayers::exp_constants {

inline constexpr float kLowest = -87.0f;   ///< Below it the result is 0: no result is subnormal.
inline constexpr float kHighest = 88.72f;  ///< Above it the result is infinity.

inline constexpr float kLog2E = 0x1.715476p+0f;    ///< 1 / ln 2
inline constexpr float kShift = 0x1.8p+23f;        ///< Adding it leaves no bits for a fraction.
inline constexpr float kLn2High = 0x1.62e43p-1f;   ///< ln 2 rounded to float32, ...
inline constexpr float kLn2Low = -0x1.05c61p-29f;  ///< ... and what it lacks.

// 1 + r + r^2 (kC2 + kC3 r + ... + kC6 r^4) is exp(r) for |r| <= ln(2) / 2, with a relative error below 2^-28: minimax
// (Lawson's iteration), the coefficients rounded to float32 one after the other, each time with the rest fitted anew.
inline constexpr float kC2 = 0x1.fffffcp-2f;
inline constexpr float kC3 = 0x1.555492p-3f;
inline constexpr float kC4 = 0x1.5558bp-5f;
inline constexpr float kC5 = 0x1.12399cp-7f;
inline constexpr float kC6 = 0x1.6a4ecep-10f;

}  // namespace bitlayers::exp_constants
