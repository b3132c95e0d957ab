// Products whose rows lie side by side in the lanes of vectors: a panel holds value i of row r at i * lanes + r.
//
// Weights are read where they lie, each once for all rows of a panel, as scalars that are spread over a vector; a BLAS
// would copy them into an order of its own first, which a few dozen rows do not pay for. A product's result is the next
// product's input. Lanes beyond the rows hold whatever comes out of zeros.
#pragma once

#include <cstdint>

#include "scratch.h"

namespace moeca {

// A matrix [outputs, inputs] with any strides, fp32 or bf16.
struct Weight {
  const void* data;
  int64_t outputs, inputs;
  int64_t output_stride, input_stride;
  bool bfloat16;
};

// Some outputs of a weight in fp32, with their bias, which may be null.
struct Strided {
  const float* data;
  int64_t output_stride, input_stride;
  const float* bias;

  Strided from(int64_t output) const {
    return {data + output * output_stride, output_stride, input_stride, bias == nullptr ? nullptr : bias + output};
  }
};

constexpr int64_t kStrip = 48;  // outputs at a time: their weights stay in cache while all rows pass

// `count` outputs from `first` on: where they lie, or widened into scratch.
Strided widened(const Weight& weight, const void* bias, int64_t first, int64_t count, Scratch& scratch);

// Lanes that `rows` rows take: whole vectors.
int64_t lanes_of(int64_t rows);

// panel[width, lanes of count] = rows[count, width].T, zeros beyond.
void to_panel(const float* rows, int64_t count, int64_t width, float* panel);

// rows[count, width] = panel[width, lanes].T
void from_panel(const float* panel, int64_t lanes, int64_t count, int64_t width, float* rows);

// y[outputs, lanes] = weight @ x[inputs, lanes] + bias, which may be null and is fp32 or bf16 as the weight is.
void multiply_panel(const Weight& weight, const void* bias, const float* x, int64_t lanes, float* y, Scratch& scratch);

// Where the processor multiplies bf16 itself, a panel may hold pairs: inputs 2i and 2i + 1 of row r, in bf16, in the 32
// bits at i * lanes + r. Sums are fp32, and no weight is widened.
bool takes_pairs(const Weight& weight);

// A panel [width, lanes] as pairs, rounded to bf16.
void to_pairs(const float* panel, int64_t width, int64_t lanes, float* pairs);

// `multiply_panel` of a panel of pairs [inputs / 2, lanes]; the result is fp32.
void multiply_pairs(const Weight& weight, const void* bias, const float* x, int64_t lanes, float* y, Scratch& scratch);

}  // namespace moeca
