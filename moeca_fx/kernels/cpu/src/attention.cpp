#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "vec.h"

namespace moeca {
namespace {

constexpr int64_t kBlock = 64;  // queries at a time: their scores stay in cache
constexpr int64_t kFew = 4;     // up to this many queries, plain dot products beat a call of the BLAS

enum Slot { kPanel, kQuery, kKey, kValue, kScores, kResult };

float dot(const float* a, const float* b, int64_t n) {
  Vector sum(0.0f);
  int64_t i = 0;
  for (; i + Vector::size() <= n; i += Vector::size())
    sum = at::vec::fmadd(Vector::loadu(a + i), Vector::loadu(b + i), sum);
  float result = total(sum);
  for (; i < n; ++i) result += a[i] * b[i];
  return result;
}

void softmax(float* row, int64_t n, float scale) {
  float high = row[0];
  int64_t start = 0;
  if (n >= Vector::size()) {
    Vector highest = Vector::loadu(row);
    for (start = Vector::size(); start + Vector::size() <= n; start += Vector::size())
      highest = at::vec::maximum(highest, Vector::loadu(row + start));
    high = at::vec::vec_reduce_all<float>([](Vector& a, Vector& b) { return at::vec::maximum(a, b); }, highest);
  }
  for (; start < n; ++start) high = std::max(high, row[start]);
  const Vector factor(scale), shift(high * scale);
  Vector lanes(0.0f);
  int64_t i = 0;
  for (; i + Vector::size() <= n; i += Vector::size()) {
    const Vector value = at::vec::fmsub(Vector::loadu(row + i), factor, shift).exp_u20();
    value.store(row + i);
    lanes = lanes + value;
  }
  float sum = total(lanes);
  for (; i < n; ++i) sum += row[i] = std::exp(row[i] * scale - high * scale);
  const Vector share(1.0f / sum);
  for (i = 0; i < n; i += Vector::size()) {
    const int64_t count = std::min<int64_t>(Vector::size(), n - i);
    (Vector::loadu(row + i, count) * share).store(row + i, static_cast<int>(count));
  }
}

// out = sum of weight[t] * value row t: columns in registers, so that the sum is written once.
void mix(const float* weight, const float* value, int64_t stride, int64_t tokens, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + 4 * Vector::size() <= width; i += 4 * Vector::size()) {
    Vector sums[4] = {Vector(0.0f), Vector(0.0f), Vector(0.0f), Vector(0.0f)};
    for (int64_t t = 0; t < tokens; ++t) {
      const Vector factor(weight[t]);
      for (int64_t j = 0; j < 4; ++j)
        sums[j] = at::vec::fmadd(factor, Vector::loadu(value + t * stride + i + j * Vector::size()), sums[j]);
    }
    for (int64_t j = 0; j < 4; ++j) sums[j].store(out + i + j * Vector::size());
  }
  for (; i < width; i += Vector::size()) {
    const int64_t n = std::min<int64_t>(Vector::size(), width - i);
    Vector sum(0.0f);
    for (int64_t t = 0; t < tokens; ++t)
      sum = at::vec::fmadd(Vector(weight[t]), Vector::loadu(value + t * stride + i, n), sum);
    sum.store(out + i, static_cast<int>(n));
  }
}

// The rows of one head as an fp32 panel: in place where they are fp32 already.
const float* panel(const void* data, int64_t first, int64_t stride, int64_t rows, int64_t width, bool bfloat16,
                   float* room, int64_t* out_stride) {
  if (!bfloat16) {
    *out_stride = stride;
    return static_cast<const float*>(data) + first;
  }
  const auto* source = static_cast<const uint16_t*>(data) + first;
  for (int64_t r = 0; r < rows; ++r) load_row(room + r * width, source + r * stride, width);
  *out_stride = width;
  return room;
}

// Queries begin .. end, all of one sample, one head.
void attend(const AttentionRows& a, int64_t begin, int64_t end, int64_t head, Scratch& scratch) {
  const int64_t sample = a.row[begin] / a.tokens, kv_head = head / (a.heads / a.kv_heads), rows = end - begin;
  const int64_t q_row = a.heads * a.width, k_row = a.kv_heads * a.width, v_row = a.kv_heads * a.value_width;
  const bool wide = a.bfloat16;
  int64_t q_stride, k_stride, v_stride;
  const float* query = panel(a.query, begin * q_row + head * a.width, q_row, rows, a.width, wide,
                             wide ? scratch.take(kQuery, rows * a.width) : nullptr, &q_stride);
  const float* key = panel(a.key, sample * a.tokens * k_row + kv_head * a.width, k_row, a.tokens, a.width, wide,
                           wide ? scratch.take(kKey, a.tokens * a.width) : nullptr, &k_stride);
  const float* value = panel(a.value, sample * a.tokens * v_row + kv_head * a.value_width, v_row, a.tokens,
                             a.value_width, wide, wide ? scratch.take(kValue, a.tokens * a.value_width) : nullptr,
                             &v_stride);
  float* scores = scratch.take(kScores, rows * a.tokens);
  float* result = scratch.take(kResult, rows * a.value_width);
  if (rows <= kFew) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < a.tokens; ++t)
        scores[r * a.tokens + t] = dot(query + r * q_stride, key + t * k_stride, a.width);
  } else {
    multiply_transposed(query, q_stride, key, k_stride, scores, a.tokens, rows, a.tokens, a.width);
  }
  for (int64_t r = 0; r < rows; ++r) softmax(scores + r * a.tokens, a.tokens, a.scale);
  if (rows <= kFew) {
    for (int64_t r = 0; r < rows; ++r)
      mix(scores + r * a.tokens, value, v_stride, a.tokens, a.value_width, result + r * a.value_width);
  } else {
    multiply(scores, a.tokens, value, v_stride, result, a.value_width, rows, a.value_width, a.tokens);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = ((begin + r) * a.heads + head) * a.value_width;
    if (wide)
      store_row(static_cast<uint16_t*>(a.out) + place, result + r * a.value_width, a.value_width);
    else
      store_row(static_cast<float*>(a.out) + place, result + r * a.value_width, a.value_width);
  }
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
  for (int64_t t = 0; t < tasks; ++t)
    attend(a, starts[t / a.heads], starts[t / a.heads + 1], t % a.heads, scratch_of_thread());
}

}  // namespace moeca
