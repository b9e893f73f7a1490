// The engine's own log, exp, sin and cos in float64: the tables of rotary positions must not depend on a C library.
// Additions, subtractions, multiplications and divisions alone, each rounded once; docs/contract.md states the
// sequence.
#pragma once

namespace bitlayers {

/// Of a positive normal number. Relative error below 1e-15.
double log64(double x);

/// For |x| up to 700. Relative error below 1e-15.
double exp64(double x);

/// For |x| up to 2^24. Relative error below 1e-15, or (next to a zero) absolute error below 1e-25.
double sin64(double x);
double cos64(double x);

}  // namespace bitlayers
