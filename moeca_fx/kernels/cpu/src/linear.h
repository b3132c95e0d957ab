// A dense layer on several threads.
#pragma once

#include <cstdint>

#include "panel.h"

namespace moeca {

// y[rows, outputs] = x[rows, inputs] @ weight.T + bias; T is float or uint16_t, which stands for bf16, in memory and
// fp32 in between; a bias may be null.
template <typename T>
void linear(const T* x, int64_t rows, const Weight& weight, const T* bias, T* y, int threads);

}  // namespace moeca
