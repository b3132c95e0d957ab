// A dense layer on several threads.
#pragma once

#include <cstdint>

#include "panel.h"

namespace moeca {

// y[rows, outputs] = x[rows, inputs] @ weight.T + bias; all in the weight's dtype in memory and fp32 in between.
void linear(const void* x, int64_t rows, const Weight& weight, const void* bias, void* y, int threads);

}  // namespace moeca
