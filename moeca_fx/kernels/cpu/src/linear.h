// Dense layers on several threads.
#pragma once

#include <cstdint>
#include <vector>

#include "panel.h"

namespace moeca {

// y[rows, outputs] = x[rows, inputs] @ weight.T + bias; T is float or uint16_t, which stands for bf16, in memory and
// fp32 in between; a bias may be null.
template <typename T>
void linear(const T* x, int64_t rows, const Weight& weight, const T* bias, T* y, int threads);

// A weight of one of several layers, its bias, and where its outputs of the first row go.
template <typename T>
struct Layer {
  Weight weight;
  const T* bias;
  T* y;
};

constexpr int64_t kSharedRows = 64;  // that layers take at once at most

// Layers of the same rows, at once: a wait and a transposition for all of them. `stride` lies between rows of results.
template <typename T>
void linears(const T* x, int64_t rows, const std::vector<Layer<T>>& layers, int64_t stride, int threads);

}  // namespace moeca
