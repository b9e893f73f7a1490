// Attention as docs/contract.md writes it, float by float: slow, and what the other paths are tested against.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "bitcore/base/float_types-inl.h"
#include "bitlayers/attention_function_tables.h"
#include "bitlayers/exp_reference.h"

namespace bitlayers {
namespace {

float widened(float element) { return element; }
float widened(std::uint16_t element) { return bitcore::float16_to_float(element); }
float widened(std::int8_t element) { return static_cast<float>(element); }

// Lanes fold 16 to 8, 4, 2, 1.
float fold(float (&lanes)[16]) {
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] = lanes[lane] + lanes[lane + half];
  }
  return lanes[0];
}

template <class Element>
float dot(const float* q, const Element* key, std::int64_t head_dim) {
  float lanes[16] = {};
  for (std::int64_t d = 0; d < head_dim; ++d) lanes[d % 16] = std::fma(q[d], widened(key[d]), lanes[d % 16]);
  return fold(lanes);
}

// The larger one, NaN where one of both is NaN.
float larger(float a, float b) {
  if (std::isnan(a)) return a;
  if (std::isnan(b)) return b;
  return std::max(a, b);
}

template <class Element>
void attend(const BlockAttention& block, std::int64_t query) {
  constexpr bool kScaled = std::is_same_v<Element, std::int8_t>;
  const auto* keys = static_cast<const Element*>(block.keys);
  const auto* values = static_cast<const Element*>(block.values);
  const std::int64_t visible = block.visible[query];

  float scores[kBlockPositions];
  float largest = -std::numeric_limits<float>::infinity();
  for (std::int64_t j = 0; j < visible; ++j) {
    scores[j] = dot(block.q[query], keys + j * block.head_dim, block.head_dim);
    if (kScaled) scores[j] = scores[j] * block.key_scales[j];
    scores[j] = scores[j] * block.scale;
    largest = larger(largest, scores[j]);
  }
  largest = largest + 0.0f;  // +0 for either zero

  float lanes[16] = {};
  float* o = block.output[query];
  std::fill_n(o, block.head_dim, 0.0f);
  for (std::int64_t j = 0; j < visible; ++j) {
    const float p = exp_reference(scores[j] - largest);
    lanes[j % 16] = lanes[j % 16] + p;
    const float weight = kScaled ? p * block.value_scales[j] : p;
    const Element* value = values + j * block.head_dim;
    for (std::int64_t d = 0; d < block.head_dim; ++d) o[d] = std::fma(weight, widened(value[d]), o[d]);
  }
  block.largest[query] = largest;
  block.sum[query] = fold(lanes);
}

void attend_block(const BlockAttention& block, float* /*scratch*/) {
  for (std::int64_t query = 0; query < block.queries; ++query) {
    if (block.form == CacheForm::float32) attend<float>(block, query);
    if (block.form == CacheForm::float16) attend<std::uint16_t>(block, query);
    if (block.form == CacheForm::int8) attend<std::int8_t>(block, query);
  }
}

void store_int8(const float* row, std::int64_t head_dim, std::int8_t* codes, float* scale) {
  float absmax = 0;
  for (std::int64_t d = 0; d < head_dim; ++d) absmax = larger(absmax, std::fabs(row[d]));
  *scale = std::isfinite(absmax) ? std::max(absmax, 1e-5f) / 127.0f : std::numeric_limits<float>::quiet_NaN();
  for (std::int64_t d = 0; d < head_dim; ++d) {
    const float code = std::nearbyint(row[d] / *scale);  // to nearest, ties to even
    codes[d] = std::isnan(code) ? std::int8_t{0} : static_cast<std::int8_t>(std::clamp(code, -128.0f, 127.0f));
  }
}

void store_row(CacheForm form, const float* row, std::int64_t head_dim, void* out, float* scale) {
  if (form == CacheForm::float32) std::memcpy(out, row, static_cast<std::size_t>(head_dim) * sizeof(float));
  if (form == CacheForm::float16) {
    auto* halves = static_cast<std::uint16_t*>(out);
    for (std::int64_t d = 0; d < head_dim; ++d) halves[d] = bitcore::float_to_float16(row[d]);
  }
  if (form == CacheForm::int8) store_int8(row, head_dim, static_cast<std::int8_t*>(out), scale);
}

void merge(float m, float l, const float* o, std::int64_t head_dim, float* M, float* L, float* O) {
  const float largest = larger(*M, m);
  const float a = exp_reference(*M - largest);
  const float c = exp_reference(m - largest);
  *M = largest;
  *L = *L * a + l * c;
  for (std::int64_t d = 0; d < head_dim; ++d) O[d] = O[d] * a + o[d] * c;
}

void finish(float L, std::int64_t head_dim, float* O) {
  for (std::int64_t d = 0; d < head_dim; ++d) O[d] = O[d] / L;
}

}  // namespace

constinit const AttentionFunctions kReferenceAttentionFunctions = {
    .store_row = store_row, .attend_block = attend_block, .merge = merge, .finish = finish};

}  // namespace bitlayers
