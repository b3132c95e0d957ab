// Matrix products on strided fp32 panels; bf16 operands are widened panel by panel, never as a whole.
#pragma once

#include <cstdint>
#include <vector>

#include "scalar.h"

namespace moeca {

// One expert's weight [outputs, inputs] inside a stack: one of the two strides is 1.
struct Weight {
  const void* data;
  int64_t outputs, inputs;
  int64_t output_stride, input_stride;
  bool bfloat16;
};

// Scratch memory of one thread, kept between calls; `take` gives at least that many floats.
class Scratch {
 public:
  float* take(int slot, int64_t floats) {
    if (slots_.size() <= static_cast<size_t>(slot)) slots_.resize(slot + 1);
    auto& room = slots_[slot];
    if (room.size() < static_cast<size_t>(floats)) room.resize(floats);
    return room.data();
  }

 private:
  std::vector<std::vector<float>> slots_;
};

// The calling thread's own; a kernel numbers its slots from 1, slot 0 is for widened panels.
inline Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

// y[rows, outputs] = x[rows, inputs] @ weight.T + bias; bias may be null and is fp32 or bf16 as the weight is.
void linear(const float* x, int64_t x_stride, int64_t rows, const Weight& weight, const void* bias, float* y,
            int64_t y_stride, Scratch& scratch);

// y[rows, outputs] = x[rows, inputs] @ weight.T + bias, all bf16 in memory and fp32 in between; on several threads.
void linear_bf16(const uint16_t* x, int64_t rows, const Weight& weight, const uint16_t* bias, uint16_t* y, int threads);

// c[m, n] = a[m, k] @ b[n, k].T, or @ b[k, n]; all fp32 with unit inner strides.
void multiply_transposed(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                         int64_t n, int64_t k);
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t n,
              int64_t k);

}  // namespace moeca
