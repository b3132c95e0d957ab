// Products of many rows: outputs lie in the lanes, rows are read where they lie and none is transposed.
//
// A table holds the weights of some outputs, transposed: value n of input i at i * lanes + n, their bias behind them.
#pragma once

#include <cstdint>

#include "panel.h"
#include "vec.h"

namespace moeca {

constexpr int64_t kTableOutputs = (Vector::size() == 16 ? 4 : 2) * Vector::size();

// Floats that the table of so many outputs takes.
int64_t table_size(int64_t outputs, int64_t inputs);

// Makes the table of up to kTableOutputs outputs, whose inputs are neighbours in memory.
void to_table(const Strided& weight, int64_t outputs, int64_t inputs, float* table);

// y[rows, outputs], `y_stride` apart, = x[rows, inputs] @ weight.T + bias
void multiply_table(const float* table, int64_t outputs, int64_t inputs, const float* x, int64_t rows, float* y,
                    int64_t y_stride);

}  // namespace moeca
