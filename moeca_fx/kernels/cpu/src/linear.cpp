#include "linear.h"

#include <omp.h>

#include <algorithm>
#include <memory>

#include "dots.h"
#include "scalar.h"

namespace moeca {
namespace {

constexpr int64_t kRows = 128;     // of one panel
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

}  // namespace

template <typename T>
void linear(const T* x, int64_t rows, const Weight& w, const T* bias, T* y, int threads) {
  const bool few = few_rows(rows, w);
  const int64_t panels = (rows + kRows - 1) / kRows, lanes = few ? rows : lanes_of(std::min(rows, kRows));
  const int64_t wanted = std::max<int64_t>(1, 2 * threads / panels);  // tasks of a panel: work for every thread
  const int64_t share = (w.outputs + wanted - 1) / wanted;
  const int64_t each = std::min(kOutputs, (share + kStep - 1) / kStep * kStep), strips = (w.outputs + each - 1) / each;
  // As panels, or the few rows as they are; written before it is read.
  const std::unique_ptr<float[]> inputs(new float[panels * lanes * w.inputs]);
#pragma omp parallel num_threads(threads) if (rows * w.outputs * w.inputs > 1 << 16)
  {
    Scratch& scratch = scratch_of_thread();
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t count = std::min(kRows, rows - p * kRows);
      float* wide = few ? inputs.get() : scratch.take(kRowsIn, lanes * w.inputs);
      load_row(wide, x + p * kRows * w.inputs, count * w.inputs);
      if (!few) to_panel(wide, count, lanes, w.inputs, inputs.get() + p * lanes * w.inputs);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < panels * strips; ++t) {
      const int64_t p = t / strips, count = std::min(kRows, rows - p * kRows);
      const int64_t first = t % strips * each, some = std::min(each, w.outputs - first);
      const Weight part = part_of<T>(w, first, some);
      const T* shift = bias == nullptr ? nullptr : bias + first;
      const float* input = inputs.get() + p * lanes * w.inputs;
      float* out = scratch.take(kRowsOut, count * some);
      if (few) {
        multiply_dots(part, shift, input, count, out, scratch);
      } else {
        float* product = scratch.take(kProduct, lanes * some);
        multiply_panel(part, shift, input, lanes, product, scratch);
        from_panel(product, lanes, count, some, out);
      }
      for (int64_t r = 0; r < count; ++r) store_row(y + (p * kRows + r) * w.outputs + first, out + r * some, some);
    }
  }
}

template void linear<float>(const float*, int64_t, const Weight&, const float*, float*, int);
template void linear<uint16_t>(const uint16_t*, int64_t, const Weight&, const uint16_t*, uint16_t*, int);

}  // namespace moeca
