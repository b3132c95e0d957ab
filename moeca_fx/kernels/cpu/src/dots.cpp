#include "dots.h"

#include <algorithm>

#include "transpose.h"
#include "vec.h"

namespace moeca {
namespace {

constexpr int kSums = kLanes == 16 ? 16 : 8;  // partial sums in registers, reduced together

// Where value n of row r goes.
struct Places {
  float* data;
  int64_t row, value;  // strides

  Places from(int64_t n) const { return {data + n * value, row, value}; }
};

// y[R, N] = x[R, inputs] @ w[N, inputs].T + bias
template <int R, int N>
void block(const Strided& w, int64_t inputs, const float* x, int64_t x_stride, const Places& y) {
  Lanes sums[R * N];
  UNROLLED for (int s = 0; s < R * N; ++s) sums[s] = Lanes{};
  const float* ahead = w.data + N * w.output_stride;
  int64_t i = 0;
  for (; i + kLanes <= inputs; i += kLanes) {
    Lanes row[R];
    UNROLLED for (int r = 0; r < R; ++r) row[r] = load(x + r * x_stride + i);
    UNROLLED for (int n = 0; n < N; ++n) {
      __builtin_prefetch(ahead + n * w.output_stride + i, 0, 1);
      const Lanes weight = load(w.data + n * w.output_stride + i);
      UNROLLED for (int r = 0; r < R; ++r) sums[r * N + n] += weight * row[r];
    }
  }
  float totals[R * N];
  add_lanes<R * N>(sums, totals);
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      float result = totals[r * N + n] + (w.bias == nullptr ? 0.0f : w.bias[n]);
      for (int64_t j = i; j < inputs; ++j) result += w.data[n * w.output_stride + j] * x[r * x_stride + j];
      y.data[r * y.row + n * y.value] = result;
    }
}

template <int R, int N = kSums / R>
void blocks(const Strided& w, int64_t outputs, int64_t inputs, const float* x, int64_t x_stride, const Places& y) {
  int64_t n = 0;
  for (; n + N <= outputs; n += N) block<R, N>(w.from(n), inputs, x, x_stride, y.from(n));
  if constexpr (N > 1)
    if (n < outputs) blocks<R, N / 2>(w.from(n), outputs - n, inputs, x, x_stride, y.from(n));
}

}  // namespace

void multiply_dots(const Weight& w, const void* bias, const float* x, int64_t rows, float* y, Scratch& scratch) {
  for (int64_t first = 0; first < w.outputs; first += kStrip) {
    const int64_t count = std::min(kStrip, w.outputs - first);
    const Strided strip = widened(w, bias, first, count, scratch);
    const Places to{y + first, w.outputs, 1};
    switch (rows) {
      case 6: blocks<6>(strip, count, w.inputs, x, w.inputs, to); break;
      case 5: blocks<5>(strip, count, w.inputs, x, w.inputs, to); break;
      case 4: blocks<4>(strip, count, w.inputs, x, w.inputs, to); break;
      case 3: blocks<3>(strip, count, w.inputs, x, w.inputs, to); break;
      case 2: blocks<2>(strip, count, w.inputs, x, w.inputs, to); break;
      default: blocks<1>(strip, count, w.inputs, x, w.inputs, to);
    }
  }
}

void multiply_rows(const Strided& w, int64_t outputs, int64_t inputs, const float* x, int64_t rows, float* y) {
  const Strided all{x, inputs, 1, nullptr};
  const Places to{y, 1, outputs};
  switch (outputs) {
    case 4: blocks<4>(all, rows, inputs, w.data, w.output_stride, to); break;
    case 3: blocks<3>(all, rows, inputs, w.data, w.output_stride, to); break;
    case 2: blocks<2>(all, rows, inputs, w.data, w.output_stride, to); break;
    default: blocks<1>(all, rows, inputs, w.data, w.output_stride, to);
  }
  if (w.bias == nullptr) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < outputs; ++n) y[r * outputs + n] += w.bias[n];
}

}  // namespace moeca
