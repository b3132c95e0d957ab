#include "attend.h"

#include <algorithm>
#include <cmath>

#include "panel.h"
#include "scalar.h"
#include "transpose.h"
#include "vec.h"

namespace moeca {
namespace {

constexpr int64_t kFewQueries = 8;  // up to here they do not fill the lanes of a vector


enum Slot { kWidened, kRows, kQuery, kScores, kResult };

void load_rows(float* to, const Strip& from, int64_t first, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t place = (first + r) * from.stride;
    if (from.bfloat16)
      load_row(to + r * width, static_cast<const uint16_t*>(from.data) + place, width);
    else
      load_row(to + r * width, static_cast<const float*>(from.data) + place, width);
  }
}

void store_result(const Head& h, int64_t row, const float* result) {
  if (h.query.bfloat16)
    store_row(static_cast<uint16_t*>(h.out) + row * h.out_stride, result, h.value_width);
  else
    store_row(static_cast<float*>(h.out) + row * h.out_stride, result, h.value_width);
}

// -- many queries: one a lane ---------------------------------------------------------------------------------------

// Every lane's column of scores[tokens, lanes] becomes exp(scale * (score - highest)); `share` takes 1 / their sums.
void softmax_lanes(float* scores, int64_t tokens, int64_t lanes, float scale, float* share) {
  const Vector factor(scale);
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    float* column = scores + lane;
    Vector highest = Vector::loadu(column);
    for (int64_t t = 1; t < tokens; ++t) highest = at::vec::maximum(highest, Vector::loadu(column + t * lanes));
    const Vector shift = highest * factor;
    Vector sum(0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      const Vector value = at::vec::fmsub(Vector::loadu(column + t * lanes), factor, shift).exp_u20();
      value.store(column + t * lanes);
      sum = sum + value;
    }
    (Vector(1.0f) / sum).store(share + lane);
  }
}

void scale_lanes(float* panel, int64_t width, int64_t lanes, const float* share) {
  for (int64_t i = 0; i < width; ++i)
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      (Vector::loadu(panel + i * lanes + lane) * Vector::loadu(share + lane)).store(panel + i * lanes + lane);
}

void attend_many(const Head& h, Scratch& scratch) {
  const int64_t lanes = lanes_of(h.queries);
  float* own = scratch.take(kRows, lanes * std::max(h.width, h.value_width));
  load_rows(own, h.query, 0, h.queries, h.width);
  float* query = scratch.take(kQuery, lanes * (h.width + 1));
  float* share = query + lanes * h.width;
  to_panel(own, h.queries, h.width, query);
  const Weight key{h.key.data, h.tokens, h.width, h.key.stride, 1, h.key.bfloat16};
  float* scores = scratch.take(kScores, lanes * h.tokens);
  multiply_panel(key, nullptr, query, lanes, scores, scratch);
  softmax_lanes(scores, h.tokens, lanes, h.scale, share);
  const Weight value{h.value.data, h.value_width, h.tokens, 1, h.value.stride, h.value.bfloat16};
  float* result = scratch.take(kResult, lanes * h.value_width);
  multiply_panel(value, nullptr, scores, lanes, result, scratch);
  scale_lanes(result, h.value_width, lanes, share);
  from_panel(result, lanes, h.queries, h.value_width, own);
  for (int64_t r = 0; r < h.queries; ++r) store_result(h, r, own + r * h.value_width);
}

// -- few queries: tokens in the lanes for the scores, values for the result -----------------------------------------

// A vector of scores of every query, `tokens` apart; `keys` holds those tokens' keys transposed, [width, kLanes].
template <int Q>
void score(const float* query, int64_t width, const float* keys, float* scores, int64_t tokens, Ahead& ahead) {
  Ahead own = ahead;  // in registers
  Lanes sums[Q];
  UNROLLED for (int q = 0; q < Q; ++q) sums[q] = Lanes{};
  for (int64_t i = 0; i < width; ++i) {
    own.fetch();
    const Lanes key = load(keys + i * kLanes);
    UNROLLED for (int q = 0; q < Q; ++q) sums[q] += query[q * width + i] * key;
  }
  UNROLLED for (int q = 0; q < Q; ++q) store(sums[q], scores + q * tokens);
  ahead = own;
}

float highest_of(const float* scores, int64_t tokens) {
  Vector lanes(scores[0]);
  int64_t t = 0;
  for (; t + kLanes <= tokens; t += kLanes) lanes = at::vec::maximum(lanes, Vector::loadu(scores + t));
  float highest = at::vec::vec_reduce_all<float>([](Vector& a, Vector& b) { return at::vec::maximum(a, b); }, lanes);
  for (; t < tokens; ++t) highest = std::max(highest, scores[t]);
  return highest;
}

// One row of scores becomes exp(scale * (score - highest)) / their sum.
void softmax_row(float* scores, int64_t tokens, float scale) {
  const Vector factor(scale);
  const float highest = highest_of(scores, tokens);
  const Vector shift(highest * scale);
  Vector sum(0.0f);
  int64_t t = 0;
  for (; t + kLanes <= tokens; t += kLanes) {
    const Vector value = at::vec::fmsub(Vector::loadu(scores + t), factor, shift).exp_u20();
    value.store(scores + t);
    sum = sum + value;
  }
  float rest = 0.0f;
  for (; t < tokens; ++t) rest += scores[t] = std::exp(scale * (scores[t] - highest));
  const Vector share(1.0f / (total(sum) + rest));
  for (t = 0; t < tokens; t += kLanes) (Vector::loadu(scores + t) * share).store(scores + t);
}

// result[q, V vectors] = scores[q, tokens] @ value[tokens, V vectors]
template <int Q, int V, typename T>
void mix(const float* scores, int64_t room, int64_t tokens, const T* value, int64_t stride, float* result,
         int64_t width, Ahead& ahead) {
  Ahead own = ahead;
  Lanes sums[Q][V];
  UNROLLED for (int q = 0; q < Q; ++q)
    UNROLLED for (int v = 0; v < V; ++v) sums[q][v] = Lanes{};
  for (int64_t t = 0; t < tokens; ++t) {
    UNROLLED for (int v = 0; v < V; ++v) own.fetch();
    Lanes row[V];
    UNROLLED for (int v = 0; v < V; ++v) row[v] = load(value + t * stride + v * kLanes);
    UNROLLED for (int q = 0; q < Q; ++q)
      UNROLLED for (int v = 0; v < V; ++v) sums[q][v] += scores[q * room + t] * row[v];
  }
  UNROLLED for (int q = 0; q < Q; ++q)
    UNROLLED for (int v = 0; v < V; ++v) store(sums[q][v], result + q * width + v * kLanes);
  ahead = own;
}

// T holds keys and values in memory: float, or uint16_t, which stands for bf16.
template <int Q, typename T>
void attend_few(const Head& h, Ahead& ahead, Scratch& scratch) {
  constexpr int kVectors = kLanes == 16 ? 2 : 1;  // sums of eight queries fit into the registers
  float* query = scratch.take(kQuery, Q * h.width);
  load_rows(query, h.query, 0, Q, h.width);
  const T *key = static_cast<const T*>(h.key.data), *value = static_cast<const T*>(h.value.data);
  const int64_t room = lanes_of(h.tokens);
  float* scores = scratch.take(kScores, Q * room);
  float* keys = scratch.take(kRows, kLanes * h.width);
  for (int64_t t = 0; t < h.tokens; t += kLanes) {
    transpose(key + t * h.key.stride, h.key.stride, std::min(kLanes, h.tokens - t), h.width, keys, kLanes);
    score<Q>(query, h.width, keys, scores + t, room, ahead);
  }
  float* result = scratch.take(kResult, Q * h.value_width);
  for (int q = 0; q < Q; ++q) softmax_row(scores + q * room, h.tokens, h.scale);
  int64_t i = 0;
  for (; i + kVectors * kLanes <= h.value_width; i += kVectors * kLanes)
    mix<Q, kVectors>(scores, room, h.tokens, value + i, h.value.stride, result + i, h.value_width, ahead);
  for (; i < h.value_width; i += kLanes)
    mix<Q, 1>(scores, room, h.tokens, value + i, h.value.stride, result + i, h.value_width, ahead);
  for (int q = 0; q < Q; ++q) store_result(h, q, result + q * h.value_width);
}

template <typename T>
void attend_few(const Head& h, Ahead& ahead, Scratch& scratch) {
  switch (h.queries) {
    case 1: return attend_few<1, T>(h, ahead, scratch);
    case 2: return attend_few<2, T>(h, ahead, scratch);
    case 3: return attend_few<3, T>(h, ahead, scratch);
    case 4: return attend_few<4, T>(h, ahead, scratch);
    case 5: return attend_few<5, T>(h, ahead, scratch);
    case 6: return attend_few<6, T>(h, ahead, scratch);
    case 7: return attend_few<7, T>(h, ahead, scratch);
    default: return attend_few<8, T>(h, ahead, scratch);
  }
}

}  // namespace

void attend(const Head& h, Ahead& ahead, Scratch& scratch) {
  if (h.queries > kFewQueries || h.value_width % kLanes != 0) return attend_many(h, scratch);
  if (h.key.bfloat16)
    attend_few<uint16_t>(h, ahead, scratch);
  else
    attend_few<float>(h, ahead, scratch);
}

}  // namespace moeca
