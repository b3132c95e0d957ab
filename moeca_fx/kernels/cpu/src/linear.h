// A dense bf16 layer on several threads.
#pragma once

#include <cstdint>

#include "panel.h"

namespace moeca {

// y[rows, outputs] = x[rows, inputs] @ weight.T + bias, all bf16 in memory and fp32 in between; a bias may be null.
void linear_bf16(const uint16_t* x, int64_t rows, const Weight& weight, const uint16_t* bias, uint16_t* y, int threads);

}  // namespace moeca
