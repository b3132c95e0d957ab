// Products of a handful of rows: dot products along the inputs, so that a vector holds many weights and not many rows.
#pragma once

#include <cstdint>

#include "panel.h"
#include "vec.h"

namespace moeca {

// Up to here the processor waits for weights, and dots read them fastest; bf16 must be widened for them.
constexpr int64_t kFewNarrowRows = 4, kFewRows = Vector::size() == 16 ? 6 : 4;
constexpr int64_t kFewOutputs = 4;  // more would be worth vectors of their own

// Whether dots are the faster product for so many rows of a weight.
inline bool few_rows(int64_t rows, const Weight& weight) {
  return rows <= (weight.bfloat16 ? kFewNarrowRows : kFewRows) && weight.input_stride == 1;
}

// y[rows, outputs] = x[rows, inputs] @ weight.T + bias; for up to kFewRows rows.
void multiply_dots(const Weight& weight, const void* bias, const float* x, int64_t rows, float* y, Scratch& scratch);

// The same of many rows, for up to kFewOutputs outputs: rows are taken as the weights above are.
void multiply_rows(const Strided& weight, int64_t outputs, int64_t inputs, const float* x, int64_t rows, float* y);

}  // namespace moeca
