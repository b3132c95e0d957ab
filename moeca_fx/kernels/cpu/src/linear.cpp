#include "linear.h"

#include <omp.h>

#include <algorithm>
#include <memory>

#include "dots.h"
#include "scalar.h"

namespace moeca {
namespace {

constexpr int64_t kRows = 64;      // of one panel: as many as are held in registers at once
constexpr int64_t kOutputs = 192;  // of one task at most; fewer where there are not enough tasks
constexpr int64_t kStep = 12;      // outputs that panels take at once, or a multiple of them

enum Slot { kWidened, kRowsIn, kProduct, kRowsOut };

// `some` outputs of a weight, from `first` on.
template <typename T>
Weight part_of(const Weight& w, int64_t first, int64_t some) {
  Weight part = w;
  part.data = static_cast<const T*>(w.data) + first * w.output_stride;
  part.outputs = some;
  return part;
}

// panel[width, lanes] = x[count, width].T, zeros beyond.
void load_panel(const float* x, int64_t count, int64_t lanes, int64_t width, float* panel, Scratch&) {
  if (count < lanes)
    for (int64_t i = 0; i < width; ++i) std::fill(panel + i * lanes + count, panel + (i + 1) * lanes, 0.0f);
  transpose(x, width, count, width, panel, lanes);
}

void load_panel(const uint16_t* x, int64_t count, int64_t lanes, int64_t width, float* panel, Scratch& scratch) {
  float* wide = scratch.take(kRowsIn, lanes * width);
  load_row(wide, x, count * width);
  to_panel(wide, count, lanes, width, panel);
}

// y[count, some], `stride` apart, from panel[some, lanes].
void store_panel(const float* panel, int64_t lanes, int64_t count, int64_t some, float* y, int64_t stride, Scratch&) {
  transpose(panel, lanes, some, count, y, stride);
}

void store_panel(const float* panel, int64_t lanes, int64_t count, int64_t some, uint16_t* y, int64_t stride,
                 Scratch& scratch) {
  float* rows = scratch.take(kRowsOut, count * some);
  from_panel(panel, lanes, count, some, rows);
  for (int64_t r = 0; r < count; ++r) store_row(y + r * stride, rows + r * some, some);
}

// Few rows as they are: they take dot products.
template <typename T>
void run_few(const T* x, int64_t rows, const Weight& w, const T* bias, T* y, int threads) {
  const int64_t each = std::max(kStrip, (w.outputs / (2 * threads) + kStrip - 1) / kStrip * kStrip);
  const int64_t strips = (w.outputs + each - 1) / each;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (rows * w.outputs * w.inputs > 1 << 16)
  for (int64_t t = 0; t < strips; ++t) {
    Scratch& scratch = scratch_of_thread();
    const int64_t first = t * each, some = std::min(each, w.outputs - first);
    float* wide = scratch.take(kRowsIn, rows * w.inputs);
    load_row(wide, x, rows * w.inputs);
    float* out = scratch.take(kRowsOut, rows * some);
    multiply_dots(part_of<T>(w, first, some), bias == nullptr ? nullptr : bias + first, wide, rows, out, scratch);
    for (int64_t r = 0; r < rows; ++r) store_row(y + r * w.outputs + first, out + r * some, some);
  }
}

}  // namespace

template <typename T>
void linear(const T* x, int64_t rows, const Weight& w, const T* bias, T* y, int threads) {
  if (few_rows(rows, w)) return run_few(x, rows, w, bias, y, threads);
  const int64_t lanes = lanes_of(std::min(rows, kRows));
  const int64_t panels = (rows + lanes - 1) / lanes;
  const int64_t wanted = std::max<int64_t>(1, 2 * threads / panels);  // tasks of a panel: work for every thread
  const int64_t share = (w.outputs + wanted - 1) / wanted;
  const int64_t each = std::min(kOutputs, (share + kStep - 1) / kStep * kStep), strips = (w.outputs + each - 1) / each;
  const std::unique_ptr<float[]> inputs(new float[panels * lanes * w.inputs]);  // written before it is read
#pragma omp parallel num_threads(threads) if (rows * w.outputs * w.inputs > 1 << 16)
  {
    Scratch& scratch = scratch_of_thread();
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p)
      load_panel(x + p * lanes * w.inputs, std::min(lanes, rows - p * lanes), lanes, w.inputs,
                 inputs.get() + p * lanes * w.inputs, scratch);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < panels * strips; ++t) {
      const int64_t p = t / strips, first = t % strips * each, some = std::min(each, w.outputs - first);
      float* product = scratch.take(kProduct, lanes * some);
      multiply_panel(part_of<T>(w, first, some), bias == nullptr ? nullptr : bias + first,
                     inputs.get() + p * lanes * w.inputs, lanes, product, scratch);
      store_panel(product, lanes, std::min(lanes, rows - p * lanes), some, y + p * lanes * w.outputs + first,
                  w.outputs, scratch);
    }
  }
}

template void linear<float>(const float*, int64_t, const Weight&, const float*, float*, int);
template void linear<uint16_t>(const uint16_t*, int64_t, const Weight&, const uint16_t*, uint16_t*, int);

}  // namespace moeca
