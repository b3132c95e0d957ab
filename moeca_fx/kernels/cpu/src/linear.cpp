#include "linear.h"

#include <omp.h>

#include <algorithm>

#include "dots.h"
#include "packed.h"
#include "scalar.h"
#include "transpose.h"

namespace moeca {
namespace {

constexpr int64_t kPanel = kSharedRows;  // rows of one panel: as many as are held in registers at once
constexpr int64_t kOutputs = 192;  // of one product: it is still in cache when it is stored
constexpr int64_t kStep = 12;      // outputs that panels take at once, or a multiple of them

constexpr int64_t kBlock = 48;     // rows that all outputs of a task are made of before the next rows
constexpr int64_t kSmallWeight = 1 << 14;  // values: rows of results are then written as a whole

enum Slot { kWidened, kRowsIn, kInput, kProduct, kRowsOut, kTables };

// How rows and outputs are divided into tasks.
struct Tiles {
  int64_t vectors, panels, strips, outputs;  // vectors of rows, in so many panels; strips of so many outputs

  // Panels as even as whole vectors allow, as many for every thread; strips only where there are not enough panels.
  static Tiles of(int64_t rows, int64_t outputs, int64_t threads) {
    Tiles tiles{};
    tiles.vectors = lanes_of(rows) / kLanes;
    tiles.panels = (lanes_of(rows) + kPanel - 1) / kPanel;
    if (tiles.panels > 1) tiles.panels = std::min(tiles.vectors, (tiles.panels + threads - 1) / threads * threads);
    const int64_t wanted = tiles.panels >= threads ? 1 : 2 * threads / tiles.panels;
    tiles.outputs = (outputs + wanted * kStep - 1) / (wanted * kStep) * kStep;
    tiles.strips = (outputs + tiles.outputs - 1) / tiles.outputs;
    return tiles;
  }

  int64_t first_row(int64_t panel) const { return vectors * panel / panels * kLanes; }
};

// `some` outputs of a layer, from `first` on.
template <typename T>
Layer<T> part_of(const Layer<T>& layer, int64_t first, int64_t some) {
  Layer<T> part = layer;
  part.weight.data = static_cast<const T*>(layer.weight.data) + first * layer.weight.output_stride;
  part.weight.outputs = some;
  if (layer.bias != nullptr) part.bias += first;
  part.y += first;
  return part;
}

// Rows as they lie in fp32, widened otherwise.
const float* wide_rows(const float* x, int64_t, Scratch&) { return x; }

const float* wide_rows(const uint16_t* x, int64_t values, Scratch& scratch) {
  float* wide = scratch.take(kRowsIn, values);
  load_row(wide, x, values);
  return wide;
}

// Stores what `product(y, stride)` makes: `count` rows of `some` outputs, `stride` apart in y.
template <typename Product>
void make_rows(float* y, int64_t stride, int64_t, int64_t, Scratch&, const Product& product) {
  product(y, stride);
}

template <typename Product>
void make_rows(uint16_t* y, int64_t stride, int64_t count, int64_t some, Scratch& scratch, const Product& product) {
  float* wide = scratch.take(kRowsOut, count * some);
  product(wide, some);
  for (int64_t r = 0; r < count; ++r) store_row(y + r * stride, wide + r * some, some);
}

// The layers in strips of outputs, about `wanted` in all; a strip is a layer of its own.
template <typename T>
std::vector<Layer<T>> strips_of(const std::vector<Layer<T>>& layers, int64_t wanted, int64_t step) {
  int64_t outputs = 0;
  for (const Layer<T>& layer : layers) outputs += layer.weight.outputs;
  std::vector<Layer<T>> strips;
  for (const Layer<T>& layer : layers) {
    const int64_t own = layer.weight.outputs, parts = std::max<int64_t>(1, (own * wanted + outputs / 2) / outputs);
    const int64_t each = (own + parts * step - 1) / (parts * step) * step;
    for (int64_t first = 0; first < own; first += each)
      strips.push_back(part_of(layer, first, std::min(each, own - first)));
  }
  return strips;
}

// One output or a handful: dot products along the rows.
template <typename T>
void run_few_outputs(const T* x, int64_t rows, const Weight& w, const T* bias, T* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * w.outputs * w.inputs > 1 << 16)
  for (int64_t row = 0; row < rows; row += kPanel) {
    Scratch& scratch = scratch_of_thread();
    const int64_t count = std::min(kPanel, rows - row);
    const Strided all = widened(w, bias, 0, w.outputs, scratch);
    const float* from = wide_rows(x + row * w.inputs, count * w.inputs, scratch);
    make_rows(y + row * w.outputs, w.outputs, count, w.outputs, scratch,
              [&](float* to, int64_t) { multiply_rows(all, w.outputs, w.inputs, from, count, to); });
  }
}

// Whether transposing the weight moves fewer values than transposing rows and results.
bool packs(int64_t rows, const Weight& w) {
  return w.input_stride == 1 && w.outputs * w.inputs <= rows * (w.outputs + w.inputs);
}

// Many rows: a task transposes the weights of its outputs, a strip of them or, of a small weight, all.
template <typename T>
void run_packed(const T* x, int64_t rows, const Weight& w, const T* bias, T* y, int threads) {
  const int64_t part = w.outputs * w.inputs <= kSmallWeight ? w.outputs : kTableOutputs;
  const int64_t parts = (w.outputs + part - 1) / part, wanted = std::max<int64_t>(4 * threads / parts, 1);
  const int64_t each = std::max(kPanel, (rows + wanted - 1) / wanted), chunks = (rows + each - 1) / each;
  const int64_t size = table_size(kTableOutputs, w.inputs);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (rows * w.outputs * w.inputs > 1 << 16)
  for (int64_t t = 0; t < parts * chunks; ++t) {
    Scratch& scratch = scratch_of_thread();
    const int64_t begin = t / chunks * part, end = std::min(w.outputs, begin + part);
    const int64_t top = t % chunks * each, bottom = std::min(rows, top + each);
    float* tables = scratch.take(kTables, (part + kTableOutputs - 1) / kTableOutputs * size);
    auto for_strips = [&](const auto& strip) {
      float* table = tables;
      for (int64_t first = begin; first < end; first += kTableOutputs, table += size)
        strip(first, std::min(kTableOutputs, end - first), table);
    };
    for_strips([&](int64_t first, int64_t some, float* table) {
      to_table(widened(w, bias, first, some, scratch), some, w.inputs, table);
    });
    for (int64_t row = top; row < bottom; row += kBlock) {
      const int64_t count = std::min(kBlock, bottom - row);
      const float* from = wide_rows(x + row * w.inputs, count * w.inputs, scratch);
      for_strips([&](int64_t first, int64_t some, const float* table) {
        make_rows(y + row * w.outputs + first, w.outputs, count, some, scratch, [&](float* to, int64_t stride) {
          multiply_table(table, some, w.inputs, from, count, to, stride);
        });
      });
    }
  }
}

// Outputs of a panel [inputs, lanes] of `count` rows.
template <typename T>
void run_panel(const Layer<T>& layer, const float* panel, int64_t lanes, int64_t count, int64_t stride,
               Scratch& scratch) {
  for (int64_t first = 0; first < layer.weight.outputs; first += kOutputs) {
    const int64_t some = std::min(kOutputs, layer.weight.outputs - first);
    const Layer<T> part = part_of(layer, first, some);
    float* product = scratch.take(kProduct, lanes * some);
    multiply_panel(part.weight, part.bias, panel, lanes, product, scratch);
    make_rows(part.y, stride, count, some, scratch,
              [&](float* to, int64_t apart) { transpose(product, lanes, some, count, to, apart); });
  }
}

}  // namespace

template <typename T>
void linears(const T* x, int64_t rows, const std::vector<Layer<T>>& layers, int64_t stride, int threads) {
  const int64_t inputs = layers.front().weight.inputs, lanes = lanes_of(rows);
  bool dots = true;  // of few rows as they are
  int64_t outputs = 0;
  for (const Layer<T>& layer : layers) {
    dots = dots && few_rows(rows, layer.weight);
    outputs += layer.weight.outputs;
  }
  const std::vector<Layer<T>> strips = strips_of(layers, 2 * threads, dots ? kStrip : kStep);
  const int64_t count = static_cast<int64_t>(strips.size());
#pragma omp parallel num_threads(threads) if (rows * outputs * inputs > 1 << 16)
  {
    Scratch& scratch = scratch_of_thread();
    const float* from = wide_rows(x, rows * inputs, scratch);
    float* panel = dots ? nullptr : scratch.take(kInput, lanes * inputs);
    if (!dots) to_panel(from, rows, inputs, panel);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < count; ++t) {
      const Layer<T>& strip = strips[t];
      if (!dots) {
        run_panel(strip, panel, lanes, rows, stride, scratch);
        continue;
      }
      const int64_t some = strip.weight.outputs;
      float* out = scratch.take(kRowsOut, rows * some);
      multiply_dots(strip.weight, strip.bias, from, rows, out, scratch);
      for (int64_t r = 0; r < rows; ++r) store_row(strip.y + r * stride, out + r * some, some);
    }
  }
}

template <typename T>
void linear(const T* x, int64_t rows, const Weight& w, const T* bias, T* y, int threads) {
  if (few_rows(rows, w)) return linears<T>(x, rows, {{w, bias, y}}, w.outputs, threads);
  if (w.outputs <= kFewOutputs && w.input_stride == 1) return run_few_outputs(x, rows, w, bias, y, threads);
  if (packs(rows, w)) return run_packed(x, rows, w, bias, y, threads);
  if (rows <= kPanel) return linears<T>(x, rows, {{w, bias, y}}, w.outputs, threads);
  const Tiles tiles = Tiles::of(rows, w.outputs, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (rows * w.outputs * w.inputs > 1 << 16)
  for (int64_t t = 0; t < tiles.panels * tiles.strips; ++t) {
    Scratch& scratch = scratch_of_thread();
    const int64_t row = tiles.first_row(t / tiles.strips), first = t % tiles.strips * tiles.outputs;
    const int64_t count = std::min(rows, tiles.first_row(t / tiles.strips + 1)) - row, lanes = lanes_of(count);
    float* panel = scratch.take(kInput, lanes * w.inputs);
    to_panel(wide_rows(x + row * w.inputs, count * w.inputs, scratch), count, w.inputs, panel);
    const Layer<T> rows_of_panel{w, bias, y + row * w.outputs};
    run_panel(part_of(rows_of_panel, first, std::min(tiles.outputs, w.outputs - first)), panel, lanes, count,
              w.outputs, scratch);
  }
}

template void linears<float>(const float*, int64_t, const std::vector<Layer<float>>&, int64_t, int);
template void linears<uint16_t>(const uint16_t*, int64_t, const std::vector<Layer<uint16_t>>&, int64_t, int);
template void linear<float>(const float*, int64_t, const Weight&, const float*, float*, int);
template void linear<uint16_t>(const uint16_t*, int64_t, const Weight&, const uint16_t*, uint16_t*, int);

}  // namespace moeca
