// Attention of every instruction set of this CPU against the plain definition, bit for bit, the definition against
// float64, and the engine's exp against the C library's.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "bitcore/base/float_types-inl.h"
#include "bitlayers/attention_functions.h"
#include "bitlayers/exp-inl.h"
#include "bitlayers/exp_reference.h"

namespace bitlayers {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr CacheForm kForms[] = {CacheForm::float32, CacheForm::float16, CacheForm::int8};
constexpr std::int64_t kHeadDims[] = {2, 16, 18, 64, 80, 96, 128, 256, 514};

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

// The bits, all NaN the same.
std::uint32_t bits_of(float value) { return std::isnan(value) ? 0x7fc00000u : std::bit_cast<std::uint32_t>(value); }

std::vector<std::uint32_t> bits_of(const std::vector<float>& values) {
  std::vector<std::uint32_t> bits;
  for (const float value : values) bits.push_back(bits_of(value));
  return bits;
}

std::vector<Path> fast_paths() {
  std::vector<Path> paths = supported_paths();
  std::erase(paths, Path::reference);
  return paths;
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  float normal() { return normal_(engine_); }
  std::int64_t below(std::int64_t limit) { return static_cast<std::int64_t>(engine_() % static_cast<unsigned>(limit)); }
  std::vector<float> normals(std::int64_t count, float factor = 1) {
    std::vector<float> values(size(count));
    for (float& value : values) value = normal() * factor;
    return values;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// Keys or values of a block in the cache's form, in memory that ends with the last of `positions`: reading one more is
// found by the address sanitizer.
struct Rows {
  std::vector<std::byte> bytes;
  std::vector<float> scales;
};

Rows stored(Path path, CacheForm form, const std::vector<float>& values, std::int64_t head_dim) {
  const std::int64_t positions = static_cast<std::int64_t>(values.size()) / head_dim;
  const std::int64_t row = head_dim * element_bytes(form);
  Rows rows{std::vector<std::byte>(size(positions * row)), std::vector<float>(size(positions), 0.0f)};
  for (std::int64_t j = 0; j < positions; ++j) {
    attention_functions(path).store_row(form, values.data() + j * head_dim, head_dim, rows.bytes.data() + j * row,
                                        &rows.scales[size(j)]);
  }
  return rows;
}

struct Case {
  CacheForm form;
  std::int64_t head_dim;
  std::vector<float> q;  // [query][head_dim]
  Rows keys;
  Rows values;
  std::vector<std::int32_t> visible;
  float scale;

  std::int64_t queries() const { return static_cast<std::int64_t>(visible.size()); }
};

struct Result {
  std::vector<float> largest, sum, output;
  bool operator==(const Result& other) const {
    return bits_of(largest) == bits_of(other.largest) && bits_of(sum) == bits_of(other.sum) &&
           bits_of(output) == bits_of(other.output);
  }
};

// Checks that nothing is written beside the outputs and the scratch memory.
Result attend(Path path, const Case& c) {
  constexpr std::int64_t kGuard = 16;
  constexpr float kMark = -12345.0f;
  const std::int64_t stride = c.head_dim + kGuard;
  const std::int64_t queries = c.queries();
  std::vector<float> output(size(queries * stride + kGuard), kMark);
  std::vector<float> largest(size(queries + kGuard), kMark), sum(size(queries + kGuard), kMark);
  std::vector<float> scratch(size(scratch_floats(queries) + 2 * kGuard), kMark);
  auto* aligned = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(scratch.data()) + 63) / 64 * 64);
  std::vector<const float*> q;
  std::vector<float*> o;
  for (std::int64_t i = 0; i < queries; ++i) {
    q.push_back(c.q.data() + i * c.head_dim);
    o.push_back(output.data() + kGuard + i * stride);
  }
  attention_functions(path).attend_block({.form = c.form,
                                          .head_dim = c.head_dim,
                                          .keys = c.keys.bytes.data(),
                                          .values = c.values.bytes.data(),
                                          .key_scales = c.keys.scales.data(),
                                          .value_scales = c.values.scales.data(),
                                          .scale = c.scale,
                                          .queries = queries,
                                          .q = q.data(),
                                          .visible = c.visible.data(),
                                          .largest = largest.data(),
                                          .sum = sum.data(),
                                          .output = o.data()},
                                         aligned);
  Result result;
  const auto is_mark = [](float value) { return value == kMark; };
  for (const float* row : o) {
    result.output.insert(result.output.end(), row, row + c.head_dim);
    EXPECT_TRUE(std::all_of(row - kGuard, row, is_mark) &&
                std::all_of(row + c.head_dim, row + c.head_dim + kGuard, is_mark));
  }
  EXPECT_TRUE(std::all_of(largest.begin() + queries, largest.end(), is_mark));
  EXPECT_TRUE(std::all_of(sum.begin() + queries, sum.end(), is_mark));
  EXPECT_TRUE(std::all_of(scratch.data(), aligned, is_mark));
  EXPECT_TRUE(std::all_of(aligned + scratch_floats(queries), scratch.data() + scratch.size(), is_mark));
  largest.resize(size(queries));
  sum.resize(size(queries));
  result.largest = largest;
  result.sum = sum;
  return result;
}

Case random_case(Random& random, CacheForm form, std::int64_t head_dim, std::vector<std::int32_t> visible) {
  const std::int64_t positions = *std::max_element(visible.begin(), visible.end());
  Case c{.form = form,
         .head_dim = head_dim,
         .q = random.normals(static_cast<std::int64_t>(visible.size()) * head_dim),
         .keys = stored(Path::reference, form, random.normals(positions * head_dim), head_dim),
         .values = stored(Path::reference, form, random.normals(positions * head_dim), head_dim),
         .visible = std::move(visible),
         .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)))};
  return c;
}

std::vector<std::int32_t> random_visible(Random& random, std::int64_t queries) {
  std::vector<std::int32_t> visible;
  for (std::int64_t i = 0; i < queries; ++i) {
    visible.push_back(static_cast<std::int32_t>(1 + random.below(kBlockPositions)));
  }
  return visible;
}

// As adjacent tokens see a block, `heads` queries each.
std::vector<std::int32_t> causal_visible(std::int64_t first, std::int64_t queries, std::int64_t heads) {
  std::vector<std::int32_t> visible;
  for (std::int64_t i = 0; i < queries; ++i) {
    visible.push_back(static_cast<std::int32_t>(std::min(kBlockPositions, first + i / heads)));
  }
  return visible;
}

void expect_every_path_agrees(const Case& c) {
  const Result expected = attend(Path::reference, c);
  for (const Path path : fast_paths()) {
    EXPECT_TRUE(attend(path, c) == expected) << to_string(path) << ", form " << static_cast<int>(c.form)
                                             << ", head_dim " << c.head_dim << ", " << c.queries() << " queries";
  }
}

TEST(Attention, EveryPathAgreesOnAnyShape) {
  Random random(1);
  for (const CacheForm form : kForms) {
    for (const std::int64_t head_dim : kHeadDims) {
      for (const std::int64_t queries : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40}) {
        if (queries > 9 && head_dim > 128) continue;  // for time
        expect_every_path_agrees(random_case(random, form, head_dim, random_visible(random, queries)));
      }
    }
  }
}

TEST(Attention, EveryPathAgreesOnEveryCountOfPositions) {
  Random random(2);
  for (std::int32_t visible = 1; visible <= kBlockPositions; ++visible) {
    const CacheForm form = kForms[visible % 3];
    expect_every_path_agrees(random_case(random, form, 16, {visible}));
    expect_every_path_agrees(random_case(random, form, 18, causal_visible(visible, 9, 2)));
  }
}

TEST(Attention, EveryPathAgreesOnACausalPrompt) {
  Random random(3);
  for (const CacheForm form : kForms) {
    expect_every_path_agrees(random_case(random, form, 64, causal_visible(250, 40, 4)));
    expect_every_path_agrees(random_case(random, form, 128, causal_visible(1, 72, 3)));
  }
}

// A key that a query does not see has no part in its result, NaN or not.
TEST(Attention, MaskedPositionsDoNotMatter) {
  Random random(4);
  for (const CacheForm form : kForms) {
    for (const std::int64_t head_dim : {18, 64}) {
      for (const std::int64_t queries : {1, 2, 3, 7, 40}) {
        std::vector<std::int32_t> visible = random_visible(random, queries);
        for (std::int32_t& count : visible) count = std::min(count, 200);
        Case c = random_case(random, form, head_dim, visible);
        Case poisoned = c;
        for (Rows* rows : {&poisoned.keys, &poisoned.values}) {
          rows->bytes.resize(size(kBlockPositions * head_dim * element_bytes(form)), std::byte{0xff});  // NaN
          rows->scales.resize(kBlockPositions, kNan);
        }
        const Result expected = attend(Path::reference, c);
        for (const Path path : supported_paths()) {
          EXPECT_TRUE(attend(path, poisoned) == expected) << to_string(path) << " " << head_dim << " " << queries;
          // Each query alone: those beside it do not matter either.
          for (std::int64_t i = 0; i < queries; ++i) {
            Case alone = poisoned;
            alone.visible = {c.visible[size(i)]};
            alone.q.assign(c.q.begin() + i * head_dim, c.q.begin() + (i + 1) * head_dim);
            const Result result = attend(path, alone);
            EXPECT_EQ(bits_of(result.sum[0]), bits_of(expected.sum[size(i)]));
            EXPECT_EQ(bits_of(result.output.back()), bits_of(expected.output[size((i + 1) * head_dim - 1)]));
          }
        }
      }
    }
  }
}

TEST(Attention, EveryPathAgreesOnSpecialValues) {
  Random random(5);
  const float specials[] = {kNan,  kInfinity, -kInfinity, 0.0f,  -0.0f, 1e-40f,
                            1e30f, -1e30f,    1e-30f,     65504, -7e4f, 1e-7f};
  for (const CacheForm form : kForms) {
    for (int round = 0; round < 100; ++round) {
      Case c = random_case(random, form, round % 2 == 0 ? 34 : 64, random_visible(random, 1 + random.below(9)));
      const std::int64_t positions = static_cast<std::int64_t>(c.keys.scales.size());
      std::vector<float> keys = random.normals(positions * c.head_dim), values = random.normals(positions * c.head_dim);
      for (std::vector<float>* where : {&c.q, &keys, &values}) {
        const std::int64_t count = random.below(3);
        for (std::int64_t i = 0; i < count; ++i) {
          (*where)[size(random.below(static_cast<std::int64_t>(where->size())))] = specials[random.below(12)];
        }
      }
      c.keys = stored(Path::reference, form, keys, c.head_dim);
      c.values = stored(Path::reference, form, values, c.head_dim);
      expect_every_path_agrees(c);
    }
  }
}

// All keys the same float, of head_dim 16, and q all 1: the score of each is key * 16 * scale.
Case flat_case(float key, std::int32_t visible, float scale) {
  Random random(6);
  return {.form = CacheForm::float32,
          .head_dim = 16,
          .q = std::vector<float>(16, 1.0f),
          .keys = stored(Path::reference, CacheForm::float32, std::vector<float>(size(visible) * 16, key), 16),
          .values = stored(Path::reference, CacheForm::float32, random.normals(std::int64_t{visible} * 16), 16),
          .visible = {visible},
          .scale = scale};
}

TEST(Attention, LimitsOfTheScores) {
  for (const Path path : supported_paths()) {
    const Result equal = attend(path, flat_case(0.5f, 100, 1));
    EXPECT_EQ(equal.largest[0], 8.0f);
    EXPECT_EQ(equal.sum[0], 100.0f);  // exp(0) is 1
    const Result zero = attend(path, flat_case(-0.0f, 3, 1));
    EXPECT_EQ(std::bit_cast<std::uint32_t>(zero.largest[0]), 0u);  // +0
    for (const float key : {kNan, kInfinity, -kInfinity}) {
      const Result none = attend(path, flat_case(key, 17, 1));
      EXPECT_EQ(bits_of(none.largest[0]), bits_of(key));
      EXPECT_TRUE(std::isnan(none.sum[0]) && std::isnan(none.output[0]));
    }
    // One key far above the others takes all.
    Case far = flat_case(0, 40, 1);
    const float key = 1e30f;
    std::memcpy(far.keys.bytes.data() + 37 * 64, &key, sizeof key);
    const Result taken = attend(path, far);
    EXPECT_EQ(taken.largest[0], 1e30f);
    EXPECT_EQ(taken.sum[0], 1.0f);
    EXPECT_EQ(std::memcmp(taken.output.data(), far.values.bytes.data() + 37 * 64, 64), 0);
  }
}

TEST(Attention, StoreRow) {
  Random random(7);
  for (const std::int64_t head_dim : kHeadDims) {
    for (int round = 0; round < 20; ++round) {
      std::vector<float> row = random.normals(head_dim, round < 5 ? 1e-6f : 3.0f);
      if (round == 6) row.back() = kNan;
      if (round == 7) row.front() = -kInfinity;
      if (round == 8) std::fill(row.begin(), row.end(), 0.0f);
      if (round == 9) row.front() = 65520;
      if (round == 10) row.front() = 1e-7f;
      for (const CacheForm form : kForms) {
        const Rows expected = stored(Path::reference, form, row, head_dim);
        for (const Path path : fast_paths()) {
          const Rows rows = stored(path, form, row, head_dim);
          EXPECT_EQ(bits_of(rows.scales), bits_of(expected.scales));
          const bool same = rows.bytes == expected.bytes;
          EXPECT_TRUE(same || (round == 6 && form == CacheForm::float16)) << to_string(path) << " " << round;
        }
      }
    }
  }
}

TEST(Attention, Int8IsTheActivationsQuantization) {
  const std::vector<float> row = {127, -127, 0.5f, 1.5f, -2.5f, 0};
  for (const Path path : supported_paths()) {
    const Rows rows = stored(path, CacheForm::int8, row, 6);
    const std::vector<std::int8_t> codes = {127, -127, 0, 2, -2, 0};
    EXPECT_EQ(rows.scales[0], 1.0f);
    EXPECT_EQ(std::memcmp(rows.bytes.data(), codes.data(), 6), 0);
    EXPECT_EQ(stored(path, CacheForm::int8, {0, 0}, 2).scales[0], 1e-5f / 127);
    EXPECT_TRUE(std::isnan(stored(path, CacheForm::int8, {0, kInfinity}, 2).scales[0]));
  }
}

// The first block as it is, the others merged into it.
Result over_blocks(Path path, const std::vector<Case>& blocks) {
  const AttentionFunctions& functions = attention_functions(path);
  Result all = attend(path, blocks[0]);
  const std::int64_t head_dim = blocks[0].head_dim;
  for (std::size_t b = 1; b < blocks.size(); ++b) {
    const Result one = attend(path, blocks[b]);
    for (std::size_t i = 0; i < all.sum.size(); ++i) {
      functions.merge(one.largest[i], one.sum[i], one.output.data() + i * size(head_dim), head_dim, &all.largest[i],
                      &all.sum[i], all.output.data() + i * size(head_dim));
    }
  }
  for (std::size_t i = 0; i < all.sum.size(); ++i) {
    functions.finish(all.sum[i], head_dim, all.output.data() + i * size(head_dim));
  }
  return all;
}

std::vector<Case> three_blocks(Random& random, CacheForm form, std::int64_t head_dim, std::int64_t queries) {
  std::vector<Case> blocks;
  for (int b = 0; b < 3; ++b) {
    blocks.push_back(
        random_case(random, form, head_dim,
                    b < 2 ? std::vector<std::int32_t>(size(queries), 256) : random_visible(random, queries)));
    blocks.back().q = blocks.front().q;
  }
  return blocks;
}

TEST(Attention, EveryPathAgreesOverBlocks) {
  Random random(8);
  for (const CacheForm form : kForms) {
    for (const std::int64_t head_dim : {18, 128}) {
      const std::vector<Case> blocks = three_blocks(random, form, head_dim, 5);
      const Result expected = over_blocks(Path::reference, blocks);
      for (const Path path : fast_paths()) EXPECT_TRUE(over_blocks(path, blocks) == expected) << to_string(path);
    }
  }
}

TEST(Attention, MergeOfLimits) {
  const float values[] = {0.0f, 1.5f, -200.0f, 300.0f, kInfinity, -kInfinity, kNan};
  for (const float before : values) {
    for (const float m : values) {
      std::vector<std::vector<std::uint32_t>> results;
      for (const Path path : supported_paths()) {
        float M = before, L = 3;
        std::vector<float> O(18, 0.7f);
        const std::vector<float> o(18, -0.3f);
        attention_functions(path).merge(m, 2, o.data(), 18, &M, &L, O.data());
        O.push_back(M);
        O.push_back(L);
        results.push_back(bits_of(O));
      }
      for (const auto& result : results) EXPECT_EQ(result, results.back()) << before << " " << m;
    }
  }
}

float element(const Case& c, const Rows& rows, std::int64_t j, std::int64_t d) {
  const std::byte* at = rows.bytes.data() + (j * c.head_dim + d) * element_bytes(c.form);
  if (c.form == CacheForm::float32) return *reinterpret_cast<const float*>(at);
  if (c.form == CacheForm::float16) return bitcore::float16_to_float(*reinterpret_cast<const std::uint16_t*>(at));
  return static_cast<float>(*reinterpret_cast<const std::int8_t*>(at)) * rows.scales[size(j)];
}

// Against a softmax in float64 over all positions. With u = 2^-24: a score of chains of head_dim / 16 steps, a fold of
// 4 and two products is off by at most (head_dim / 16 + 7) u times the sum of its terms' magnitudes, S; so is each
// weight, relatively, with 4 u for the difference and exp (1 ulp is 2 u) and 8 u for merging three blocks. The weighted
// sum of n values adds n u, l_b another n / 16 + 4 and the division one. Errors of weights count twice, once in each
// sum.
TEST(Attention, IsASoftmax) {
  Random random(9);
  constexpr double kUnit = 0x1p-24;
  for (const CacheForm form : kForms) {
    for (const std::int64_t head_dim : {18, 64, 128}) {
      const std::int64_t queries = 4;
      const std::vector<Case> blocks = three_blocks(random, form, head_dim, queries);
      const Result result = over_blocks(supported_paths().front(), blocks);
      for (std::int64_t i = 0; i < queries; ++i) {
        std::vector<double> scores;
        double most_magnitude = 0, largest = -kInfinity;
        for (const Case& c : blocks) {
          for (std::int64_t j = 0; j < c.visible[size(i)]; ++j) {
            double score = 0, magnitude = 0;
            for (std::int64_t d = 0; d < head_dim; ++d) {
              const double term = static_cast<double>(c.q[size(i * head_dim + d)]) * element(c, c.keys, j, d);
              score += term;
              magnitude += std::fabs(term);
            }
            scores.push_back(score * c.scale);
            largest = std::max(largest, scores.back());
            most_magnitude = std::max(most_magnitude, magnitude * c.scale);
          }
        }
        const double weight_error = (static_cast<double>(head_dim) / 16 + 7) * most_magnitude + 2 * largest + 16 + 8;
        const double bound = (2 * weight_error + 256 + 20 + 2) * kUnit;
        for (std::int64_t d = 0; d < head_dim; ++d) {
          double sum = 0, magnitudes = 0, total = 0;
          std::size_t at = 0;
          for (const Case& c : blocks) {
            for (std::int64_t j = 0; j < c.visible[size(i)]; ++j, ++at) {
              const double p = std::exp(scores[at] - largest);
              total += p;
              sum += p * element(c, c.values, j, d);
              magnitudes += p * std::fabs(element(c, c.values, j, d));
            }
          }
          EXPECT_LE(std::fabs(result.output[size(i * head_dim + d)] - sum / total), bound * magnitudes / total);
        }
      }
    }
  }
}

float exp_of(float x) {
  float lanes[kLanes];
  store(lanes, exp(all(x)));
  return lanes[0];
}

double units_in_the_last_place(float value, long double truth) {
  int exponent;
  std::frexp(static_cast<double>(truth), &exponent);
  return static_cast<double>(std::fabs(static_cast<long double>(value) - truth)) / std::ldexp(1.0, exponent - 24);
}

// A million floats from -87 to 88.72, of every exponent; most where the result is not 1.
TEST(Exp, IsWithinOneUnitInTheLastPlace) {
  double worst = 0;
  for (const std::uint32_t sign : {0u, 0x80000000u}) {
    const std::uint32_t end = std::bit_cast<std::uint32_t>(sign == 0 ? 88.72f : 87.0f);
    std::uint32_t bits = 1;
    while (bits <= end) {
      const float x = std::bit_cast<float>(bits | sign);
      const float y = exp_reference(x);
      EXPECT_EQ(bits_of(y), bits_of(exp_of(x))) << x;
      worst = std::max(worst, units_in_the_last_place(y, std::exp(static_cast<long double>(x))));
      bits += bits < 0x38000000u ? 0x1fff5u : 303;
    }
  }
  EXPECT_LT(worst, 0.9);
}

TEST(Exp, Limits) {
  for (const auto& function : {exp_of, exp_reference}) {
    EXPECT_EQ(function(0.0f), 1.0f);
    EXPECT_EQ(function(-0.0f), 1.0f);
    EXPECT_GT(function(-87.0f), std::numeric_limits<float>::min());
    EXPECT_EQ(bits_of(function(std::nextafter(-87.0f, -kInfinity))), 0u);
    EXPECT_LT(function(88.72f), kInfinity);
    EXPECT_EQ(function(std::nextafter(88.72f, kInfinity)), kInfinity);
    EXPECT_EQ(function(std::numeric_limits<float>::max()), kInfinity);
    EXPECT_EQ(bits_of(function(-std::numeric_limits<float>::max())), 0u);
    EXPECT_EQ(function(kInfinity), kInfinity);
    EXPECT_EQ(bits_of(function(-kInfinity)), 0u);
    EXPECT_TRUE(std::isnan(function(kNan)));
    EXPECT_TRUE(std::isnan(function(std::bit_cast<float>(0xffffffffu))));
  }
}

}  // namespace
}  // namespace bitlayers
