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

enum Slot { kWidened, kRowsIn, kProduct, kRowsOut };

// `some` outputs of a weight, from `first` on.
Weight part_of(const Weight& w, int64_t first, int64_t some) {
  Weight part = w;
  part.data = static_cast<const uint16_t*>(w.data) + first * w.output_stride;
  part.outputs = some;
  return part;
}

}  // namespace

void linear_bf16(const uint16_t* x, int64_t rows, const Weight& w, const uint16_t* bias, uint16_t* y, int threads) {
  const bool few = few_rows(rows, w);
  const int64_t panels = (rows + kRows - 1) / kRows, lanes = few ? rows : lanes_of(std::min(rows, kRows));
  const int64_t most = std::max(w.outputs * panels / (4 * threads) / kStrip * kStrip, kStrip);
  const int64_t each = std::min(kOutputs, most), strips = (w.outputs + each - 1) / each;
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
      const Weight part = part_of(w, first, some);
      const uint16_t* shift = bias == nullptr ? nullptr : bias + first;
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

}  // namespace moeca
