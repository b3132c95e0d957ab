#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "scalar.h"
#include "vec.h"

namespace moeca {
namespace {

constexpr int64_t kBlock = 64;  // queries at a time: their scores stay in cache

enum Slot { kWidened, kRows, kQuery, kScores, kResult };

// Every lane's column of scores[tokens, lanes] becomes exp(scale * (score - highest)); `share` takes 1 / their sums.
void softmax(float* scores, int64_t tokens, int64_t lanes, float scale, float* share) {
  const Vector factor(scale);
  for (int64_t lane = 0; lane < lanes; lane += Vector::size()) {
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
    for (int64_t lane = 0; lane < lanes; lane += Vector::size())
      (Vector::loadu(panel + i * lanes + lane) * Vector::loadu(share + lane)).store(panel + i * lanes + lane);
}

// Queries begin .. end, all of one sample, one head.
template <typename T>
void attend(const AttentionRows& a, int64_t begin, int64_t end, int64_t head) {
  Scratch& scratch = scratch_of_thread();
  const int64_t sample = a.row[begin] / a.tokens, kv_head = head / (a.heads / a.kv_heads);
  const int64_t rows = end - begin, lanes = lanes_of(rows);
  const int64_t k_row = a.kv_heads * a.width, v_row = a.kv_heads * a.value_width;
  float* own = scratch.take(kRows, lanes * std::max(a.width, a.value_width));
  for (int64_t r = 0; r < rows; ++r)
    load_row(own + r * a.width, static_cast<const T*>(a.query) + ((begin + r) * a.heads + head) * a.width, a.width);
  float* query = scratch.take(kQuery, lanes * (a.width + 1));
  float* share = query + lanes * a.width;
  to_panel(own, rows, lanes, a.width, query);
  const T* keys = static_cast<const T*>(a.key) + sample * a.tokens * k_row + kv_head * a.width;
  const Weight key{keys, a.tokens, a.width, k_row, 1, a.bfloat16};
  float* scores = scratch.take(kScores, lanes * a.tokens);
  multiply_panel(key, nullptr, query, lanes, scores, scratch);
  softmax(scores, a.tokens, lanes, a.scale, share);
  const T* values = static_cast<const T*>(a.value) + sample * a.tokens * v_row + kv_head * a.value_width;
  const Weight value{values, a.value_width, a.tokens, 1, v_row, a.bfloat16};
  float* result = scratch.take(kResult, lanes * a.value_width);
  multiply_panel(value, nullptr, scores, lanes, result, scratch);
  scale_lanes(result, a.value_width, lanes, share);
  from_panel(result, lanes, rows, a.value_width, own);
  for (int64_t r = 0; r < rows; ++r)
    store_row(static_cast<T*>(a.out) + ((begin + r) * a.heads + head) * a.value_width, own + r * a.value_width,
              a.value_width);
}

}  // namespace

void attention_rows(const AttentionRows& a, int threads) {
  // Blocks of rows of one sample: rows ascend, so those of a sample are neighbours.
  std::vector<int64_t> starts;
  for (int64_t r = 0; r < a.rows; ++r)
    if (r == 0 || a.row[r] / a.tokens != a.row[starts.back()] / a.tokens || r - starts.back() == kBlock)
      starts.push_back(r);
  const int64_t blocks = static_cast<int64_t>(starts.size()), tasks = blocks * a.heads;
  starts.push_back(a.rows);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks > 4)
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t begin = starts[t / a.heads], end = starts[t / a.heads + 1];
    if (a.bfloat16)
      attend<uint16_t>(a, begin, end, t % a.heads);
    else
      attend<float>(a, begin, end, t % a.heads);
  }
}

}  // namespace moeca
