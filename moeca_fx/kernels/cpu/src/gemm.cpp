#include "gemm.h"

#include <algorithm>

// The BLAS that torch itself brings (libtorch_cpu); column-major, everything by address.
extern "C" void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                       const float* beta, float* c, const int* ldc);

namespace moeca {
namespace {

constexpr int64_t kPanelFloats = 1 << 16;  // 256 KiB: a widened panel stays in the second-level cache

// Row-major c = a @ op(b): the column-major product of the transposes.
void sgemm(const float* a, int64_t lda, const float* b, int64_t ldb, char transposed, float* c, int64_t ldc, int64_t m,
           int64_t n, int64_t k, float beta = 0.0f) {
  const int rows = static_cast<int>(n), columns = static_cast<int>(m), inner = static_cast<int>(k);
  const int strides[3] = {static_cast<int>(ldb), static_cast<int>(lda), static_cast<int>(ldc)};
  const float one = 1.0f;
  const char plain = 'N';
  sgemm_(&transposed, &plain, &rows, &columns, &inner, &one, b, &strides[0], a, &strides[1], &beta, c, &strides[2]);
}

void add_bias(float* y, int64_t y_stride, int64_t rows, int64_t outputs, const void* bias, bool bfloat16) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < outputs; ++n) y[r * y_stride + n] += load_one(bias, n, bfloat16);
}

}  // namespace

void multiply_transposed(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                         int64_t n, int64_t k) {
  sgemm(a, lda, b, ldb, 'T', c, ldc, m, n, k);
}

void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t n,
              int64_t k) {
  sgemm(a, lda, b, ldb, 'N', c, ldc, m, n, k);
}

void linear(const float* x, int64_t x_stride, int64_t rows, const Weight& w, const void* bias, float* y,
            int64_t y_stride, Scratch& scratch) {
  const bool by_output = w.input_stride == 1;  // rows of the matrix in memory are outputs
  const int64_t stride = std::max<int64_t>(by_output ? w.output_stride : w.input_stride, 1);
  if (!w.bfloat16) {
    const auto* data = static_cast<const float*>(w.data);
    sgemm(x, x_stride, data, stride, by_output ? 'T' : 'N', y, y_stride, rows, w.outputs, w.inputs);
  } else if (by_output) {
    const auto* data = static_cast<const uint16_t*>(w.data);
    const int64_t step = std::max<int64_t>(kPanelFloats / w.inputs, 16);
    for (int64_t begin = 0; begin < w.outputs; begin += step) {
      const int64_t count = std::min(step, w.outputs - begin);
      float* panel = scratch.take(0, count * w.inputs);
      for (int64_t n = 0; n < count; ++n) load_row(panel + n * w.inputs, data + (begin + n) * stride, w.inputs);
      sgemm(x, x_stride, panel, w.inputs, 'T', y + begin, y_stride, rows, count, w.inputs);
    }
  } else {
    const auto* data = static_cast<const uint16_t*>(w.data);
    const int64_t step = std::max<int64_t>(kPanelFloats / w.outputs, 16);
    for (int64_t begin = 0; begin < w.inputs; begin += step) {
      const int64_t count = std::min(step, w.inputs - begin);
      float* panel = scratch.take(0, count * w.outputs);
      for (int64_t k = 0; k < count; ++k) load_row(panel + k * w.outputs, data + (begin + k) * stride, w.outputs);
      sgemm(x + begin, x_stride, panel, w.outputs, 'N', y, y_stride, rows, w.outputs, count, begin ? 1.0f : 0.0f);
    }
  }
  if (bias != nullptr) add_bias(y, y_stride, rows, w.outputs, bias, w.bfloat16);
}

}  // namespace moeca
