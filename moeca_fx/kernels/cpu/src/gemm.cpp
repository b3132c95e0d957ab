#include "gemm.h"

#include <algorithm>

#include "vec.h"

// The BLAS that torch itself brings (libtorch_cpu); column-major, everything by address.
extern "C" void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                       const float* beta, float* c, const int* ldc);

namespace moeca {
namespace {

constexpr int64_t kFewRows = 12;  // up to here weights are read once, straight from memory; the BLAS would copy them
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

// y[R, 2] = x[R, k] @ w[2, k].T for R rows held in registers.
template <int R>
void dot_block(const float* x, int64_t x_stride, const float* w0, const float* w1, int64_t k, float* y,
               int64_t y_stride, bool both) {
  Vector first[R], second[R];
  for (int r = 0; r < R; ++r) first[r] = second[r] = Vector(0.0f);
  int64_t i = 0;
  for (; i + Vector::size() <= k; i += Vector::size()) {
    const Vector a = Vector::loadu(w0 + i), b = Vector::loadu(w1 + i);
    for (int r = 0; r < R; ++r) {
      const Vector value = Vector::loadu(x + r * x_stride + i);
      first[r] = at::vec::fmadd(value, a, first[r]);
      second[r] = at::vec::fmadd(value, b, second[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float sums[2] = {total(first[r]), total(second[r])};
    for (int64_t j = i; j < k; ++j) {
      sums[0] += x[r * x_stride + j] * w0[j];
      sums[1] += x[r * x_stride + j] * w1[j];
    }
    y[r * y_stride] = sums[0];
    if (both) y[r * y_stride + 1] = sums[1];
  }
}

// y = x @ w.T for a few rows: every weight is read from memory once.
void multiply_few(const float* x, int64_t x_stride, const float* w, int64_t w_stride, float* y, int64_t y_stride,
                  int64_t rows, int64_t outputs, int64_t k) {
  for (int64_t n = 0; n < outputs; n += 2) {
    const bool both = n + 1 < outputs;
    const float *w0 = w + n * w_stride, *w1 = both ? w0 + w_stride : w0;
    for (int64_t r = 0; r < rows; r += 4) {
      const float* from = x + r * x_stride;
      float* to = y + r * y_stride + n;
      switch (std::min<int64_t>(4, rows - r)) {
        case 4: dot_block<4>(from, x_stride, w0, w1, k, to, y_stride, both); break;
        case 3: dot_block<3>(from, x_stride, w0, w1, k, to, y_stride, both); break;
        case 2: dot_block<2>(from, x_stride, w0, w1, k, to, y_stride, both); break;
        default: dot_block<1>(from, x_stride, w0, w1, k, to, y_stride, both);
      }
    }
  }
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
    if (by_output && rows <= kFewRows)
      multiply_few(x, x_stride, data, stride, y, y_stride, rows, w.outputs, w.inputs);
    else
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

void linear_bf16(const uint16_t* x, int64_t rows, const Weight& w, const uint16_t* bias, uint16_t* y, int threads) {
  constexpr int64_t kOutputs = 64, kRows = 512;  // of one task: panel, inputs and result stay in cache
  std::vector<float> wide(rows * w.inputs);
  const int64_t panels = (w.outputs + kOutputs - 1) / kOutputs;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) load_row(wide.data() + r * w.inputs, x + r * w.inputs, w.inputs);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < panels; ++p) {
      Scratch& scratch = scratch_of_thread();
      const int64_t first = p * kOutputs, count = std::min(kOutputs, w.outputs - first);
      Weight part = w;
      part.data = static_cast<const uint16_t*>(w.data) + first * w.output_stride;
      part.outputs = count;
      for (int64_t begin = 0; begin < rows; begin += kRows) {
        const int64_t some = std::min(kRows, rows - begin);
        float* out = scratch.take(1, some * count);
        linear(wide.data() + begin * w.inputs, w.inputs, some, part, bias == nullptr ? nullptr : bias + first, out,
               count, scratch);
        for (int64_t r = 0; r < some; ++r) store_row(y + (begin + r) * w.outputs + first, out + r * count, count);
      }
    }
  }
}

}  // namespace moeca
