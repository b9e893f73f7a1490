#include "bitlayers/elementary64.h"

#include <bit>
#include <cstddef>
#include <cstdint>

namespace bitlayers {
namespace {

// c[0] + x (c[1] + x (c[2] + ...)), from the inside.
template <std::size_t kCount>
double polynomial(double x, const double (&c)[kCount]) {
  double sum = c[kCount - 1];
  for (std::size_t i = kCount - 1; i-- > 0;) sum = sum * x + c[i];
  return sum;
}

// To the nearest integer, ties to even, for |x| < 2^51: adding it leaves no bits for a fraction.
constexpr double kShift = 0x1.8p52;
double nearest(double x) { return (x + kShift) - kShift; }

// ln 2 = kLn2High + kLn2Low; a product of kLn2High, of 40 bits, with an exponent is exact.
constexpr double kLn2High = 0x1.62e42fefa2p-1;
constexpr double kLn2Low = 0x1.9ef35793c7673p-41;

// pi / 2 = kFirst + kSecond + kThird. The first two have 28 bits, so that their products with integers up to 2^24 are
// exact.
constexpr double kFirst = 0x1.921fb54p+0;
constexpr double kSecond = 0x1.10b461p-30;
constexpr double kThird = 0x1.a62633145c06ep-58;

// sin(x) or cos(x) is sin or cos of `rest`, with the sign and the choice that `quarters` mod 4 names.
struct Reduced {
  std::int64_t quarters;
  double rest;  // within pi / 4, and a rounding
};

Reduced reduce(double x) {
  const double n = nearest(x * 0x1.45f306dc9c883p-1);  // 2 / pi
  const double a = x - n * kFirst;                     // exact
  const double b = n * kSecond;                        // exact
  const double difference = a - b;
  // a - b is difference + error, exactly (two-sum).
  const double back = difference - a;
  const double error = (a - (difference - back)) - (b + back);
  return {static_cast<std::int64_t>(n), difference + (error - n * kThird)};
}

// Taylor's series of sin(r) / r - 1 over r^2, and of cos(r) - 1 over r^2, in r^2.
constexpr double kSine[] = {-1.0 / 6,        1.0 / 120,        -1.0 / 5040,          1.0 / 362880,
                            -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000, 1.0 / 355687428096000};
constexpr double kCosine[] = {-1.0 / 2,       1.0 / 24,        -1.0 / 720,         1.0 / 40320,
                              -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};

double sine_of_rest(double r) {
  const double square = r * r;
  return r + r * (square * polynomial(square, kSine));
}

double cosine_of_rest(double r) {
  const double square = r * r;
  return 1.0 + square * polynomial(square, kCosine);
}

// The value of sin at `rest` and `quarters` quarter turns.
double sine_after(double rest, std::int64_t quarters) {
  const double value = (quarters & 1) != 0 ? cosine_of_rest(rest) : sine_of_rest(rest);
  return (quarters & 2) != 0 ? -value : value;
}

}  // namespace

double log64(double x) {
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(x);
  // x = 2^exponent * m, m from about sqrt(1 / 2) to sqrt(2): 0x95f62... is 2^52 - the mantissa of sqrt(2).
  const std::uint64_t shifted = bits + 0x95f619980c433ull;
  const std::int64_t exponent = static_cast<std::int64_t>(shifted >> 52) - 1023;
  const double m = std::bit_cast<double>(bits - (static_cast<std::uint64_t>(exponent) << 52));
  // log(m) = 2 artanh(s)
  constexpr double kSeries[] = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11,
                                2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
  const double f = m - 1.0;
  const double s = f / (m + 1.0);
  const double square = s * s;
  const double e = static_cast<double>(exponent);
  // 2 s = f - s f: f is exact, and so the larger part has no error.
  const double rest = s * (square * polynomial(square, kSeries) - f) + e * kLn2Low;
  return e * kLn2High + (f + rest);
}

double exp64(double x) {
  // 1 / 2!, 1 / 3!, ...
  constexpr double kSeries[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  const double n = nearest(x * 0x1.71547652b82fep+0);  // 1 / ln 2
  const double high = x - n * kLn2High;
  const double low = n * kLn2Low;
  const double r = high - low;
  const double p = 1.0 + (r + (r * r) * polynomial(r, kSeries));
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(p) +
                               (static_cast<std::uint64_t>(static_cast<std::int64_t>(n)) << 52));
}

double sin64(double x) {
  const Reduced reduced = reduce(x);
  return sine_after(reduced.rest, reduced.quarters);
}

double cos64(double x) {
  const Reduced reduced = reduce(x);
  return sine_after(reduced.rest, reduced.quarters + 1);
}

}  // namespace bitlayers
