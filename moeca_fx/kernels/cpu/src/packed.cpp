#include "packed.h"

#include <algorithm>

#include "transpose.h"

namespace moeca {
namespace {

// Rows held in registers beside V vectors of outputs.
constexpr int rows_beside(int vectors) {
  if (kLanes == 16) return vectors == 1 ? 16 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 8 : 6;
}

// y[R, outputs] in V vectors a row, the last of which may hold fewer outputs.
template <int R, int V>
void block(const float* table, int64_t inputs, const float* x, float* y, int64_t y_stride, int64_t outputs) {
  Lanes sums[R][V];
  const float* bias = table + inputs * V * kLanes;
  UNROLLED for (int r = 0; r < R; ++r)
    UNROLLED for (int v = 0; v < V; ++v) sums[r][v] = load(bias + v * kLanes);
  const float* ahead = x + R * inputs;  // the next block's rows
  for (int64_t i = 0; i < inputs; ++i, table += V * kLanes) {
    __builtin_prefetch(ahead + i * R, 0, 2);
    Lanes weight[V];
    UNROLLED for (int v = 0; v < V; ++v) weight[v] = load(table + v * kLanes);
    UNROLLED for (int r = 0; r < R; ++r)
      UNROLLED for (int v = 0; v < V; ++v) sums[r][v] += x[r * inputs + i] * weight[v];
  }
  const int64_t last = outputs - (V - 1) * kLanes;
  UNROLLED for (int r = 0; r < R; ++r) {
    float* to = y + r * y_stride;
    UNROLLED for (int v = 0; v < V - 1; ++v) store(sums[r][v], to + v * kLanes);
    if (last == kLanes)
      store(sums[r][V - 1], to + (V - 1) * kLanes);
    else
      std::memcpy(to + (V - 1) * kLanes, &sums[r][V - 1], last * sizeof(float));
  }
}

// All rows: blocks of R, then halves of a block for what is left over, down to single rows.
template <int V, int R = rows_beside(V)>
void blocks(const float* table, int64_t inputs, const float* x, int64_t rows, float* y, int64_t y_stride,
            int64_t outputs) {
  for (; rows >= R; rows -= R, x += R * inputs, y += R * y_stride)
    block<R, V>(table, inputs, x, y, y_stride, outputs);
  if constexpr (R > 1)
    if (rows > 0) blocks<V, R / 2>(table, inputs, x, rows, y, y_stride, outputs);
}

}  // namespace

int64_t table_size(int64_t outputs, int64_t inputs) { return lanes_of(outputs) * (inputs + 1); }

void to_table(const Strided& weight, int64_t outputs, int64_t inputs, float* table) {
  const int64_t lanes = lanes_of(outputs);
  transpose_padded(weight.data, weight.output_stride, outputs, inputs, table, lanes);
  float* bias = table + inputs * lanes;
  std::fill_n(bias, lanes, 0.0f);
  if (weight.bias != nullptr) std::copy_n(weight.bias, outputs, bias);
}

void multiply_table(const float* table, int64_t outputs, int64_t inputs, const float* x, int64_t rows, float* y,
                    int64_t y_stride) {
  switch (lanes_of(outputs) / kLanes) {
    case 1: return blocks<1>(table, inputs, x, rows, y, y_stride, outputs);
    case 2: return blocks<2>(table, inputs, x, rows, y, y_stride, outputs);
    case 3: return blocks<3>(table, inputs, x, rows, y, y_stride, outputs);
    default: return blocks<4>(table, inputs, x, rows, y, y_stride, outputs);
  }
}

}  // namespace moeca
