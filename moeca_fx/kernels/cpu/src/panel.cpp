#include "panel.h"

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)  // torch may be told to use narrower vectors
#define BF16_PRODUCTS
#include <immintrin.h>
#endif

#include <algorithm>

#include "scalar.h"
#include "transpose.h"
#include "vec.h"

namespace moeca {
namespace {

constexpr bool kManyRegisters = kLanes == 16;  // 32 vector registers with AVX-512, 16 without
constexpr int kMostVectors = kManyRegisters ? 4 : 2;
constexpr int64_t kInputs = 512;  // at a time: a few vectors of rows of so many stay in the first cache
constexpr int64_t kLine = 16;     // floats that are fetched from memory at once
constexpr int64_t kAhead = 8;     // inputs, where outputs are neighbours in memory

// What a weight and a vector of rows add to a vector of sums.
struct Floats {
  static Lanes add(const Lanes& sums, float weight, const Lanes& rows) { return sums + weight * rows; }
};

// Two inputs in bf16 side by side in every 32 bits.
struct Pairs {
  static Lanes add(const Lanes& sums, float weight, const Lanes& rows) {
#ifdef BF16_PRODUCTS
    const __m512 spread = _mm512_set1_ps(weight);
    return _mm512_dpbf16_ps(sums, (__m512bh)spread, (__m512bh)rows);
#else
    return sums;  // never called: see `takes_pairs`
#endif
  }
};

// Outputs held in registers beside V vectors of rows: as many sums as there are registers left.
constexpr int outputs_beside(int vectors) {
  if (kManyRegisters) return vectors == 1 ? 16 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 12 : 6;
}

// Fetches the weights of the next N outputs line by line, or those some inputs ahead where outputs are neighbours.
template <int N>
class Ahead {
 public:
  Ahead(const Strided& w, int64_t inputs)
      : line_(w.data + (w.input_stride == 1 ? N * w.output_stride : kAhead * w.input_stride)),
        step_(w.input_stride == 1 ? w.output_stride : w.input_stride),
        rows_(w.input_stride == 1 ? N : inputs) {}

  void fetch() {
    __builtin_prefetch(line_ + at_, 0, 1);
    at_ += step_;
    if (++row_ == rows_) {
      row_ = at_ = 0;
      line_ += kLine;
    }
  }

 private:
  const float* line_;
  int64_t step_, rows_, row_ = 0, at_ = 0;
};

// y[N, V vectors] = w[N, inputs] @ x[inputs, V vectors] + the bias for the first inputs, what `y` holds for later ones
template <class Product, bool First, int V, int N>
void block(const Strided& w, int64_t inputs, const float* x, int64_t lanes, float* y) {
  Lanes sums[N][V];
  UNROLLED for (int n = 0; n < N; ++n)
    UNROLLED for (int v = 0; v < V; ++v)
      sums[n][v] = First ? Lanes{} + (w.bias == nullptr ? 0.0f : w.bias[n]) : load(y + n * lanes + v * kLanes);
  // Weights of N rows at once are too many streams for the processor to foresee: fetch the next block's in time.
  Ahead<N> ahead(w, inputs);
  const float* weight = w.data;
  for (int64_t i = 0; i < inputs; ++i, weight += w.input_stride, x += lanes) {
    ahead.fetch();
    Lanes row[V];
    UNROLLED for (int v = 0; v < V; ++v) row[v] = load(x + v * kLanes);
    UNROLLED for (int n = 0; n < N; ++n)
      UNROLLED for (int v = 0; v < V; ++v) sums[n][v] = Product::add(sums[n][v], weight[n * w.output_stride], row[v]);
  }
  UNROLLED for (int n = 0; n < N; ++n)
    UNROLLED for (int v = 0; v < V; ++v) store(sums[n][v], y + n * lanes + v * kLanes);
}

// All outputs, V vectors of rows: blocks of N, then halves of a block for what is left over, down to single outputs.
template <class Product, bool First, int V, int N>
void blocks(const Strided& w, int64_t outputs, int64_t inputs, const float* x, int64_t lanes, float* y) {
  int64_t n = 0;
  for (; n + N <= outputs; n += N) block<Product, First, V, N>(w.from(n), inputs, x, lanes, y + n * lanes);
  if constexpr (N > 1)
    if (n < outputs) blocks<Product, First, V, N / 2>(w.from(n), outputs - n, inputs, x, lanes, y + n * lanes);
}

// All outputs, all rows: as many vectors at a time as fit beside the sums.
template <class Product, bool First, int V = kMostVectors>
void strip(const Strided& w, int64_t outputs, int64_t inputs, const float* x, int64_t lanes, int64_t left, float* y) {
  for (; left >= V * kLanes; left -= V * kLanes, x += V * kLanes, y += V * kLanes)
    blocks<Product, First, V, outputs_beside(V)>(w, outputs, inputs, x, lanes, y);
  if constexpr (V > 1)
    if (left > 0) strip<Product, First, V - 1>(w, outputs, inputs, x, lanes, left, y);
}

}  // namespace

Strided widened(const Weight& w, const void* bias, int64_t first, int64_t count, Scratch& scratch) {
  const int64_t place = first * w.output_stride;
  if (!w.bfloat16) {
    const auto* shift = static_cast<const float*>(bias);
    return Strided{static_cast<const float*>(w.data), w.output_stride, w.input_stride, shift}.from(first);
  }
  const auto* narrow = static_cast<const uint16_t*>(w.data) + place;
  float* wide = scratch.take(0, count * (w.inputs + 1));
  float* shift = bias == nullptr ? nullptr : wide + count * w.inputs;
  if (shift != nullptr) load_row(shift, static_cast<const uint16_t*>(bias) + first, count);
  if (w.input_stride == 1) {
    for (int64_t n = 0; n < count; ++n) load_row(wide + n * w.inputs, narrow + n * w.output_stride, w.inputs);
    return {wide, w.inputs, 1, shift};
  }
  for (int64_t i = 0; i < w.inputs; ++i)
    for (int64_t n = 0; n < count; ++n) wide[i * count + n] = widen(narrow[i * w.input_stride + n * w.output_stride]);
  return {wide, 1, count, shift};
}

int64_t lanes_of(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }

void to_panel(const float* rows, int64_t count, int64_t width, float* panel) {
  transpose_padded(rows, width, count, width, panel, lanes_of(count));
}

void from_panel(const float* panel, int64_t lanes, int64_t count, int64_t width, float* rows) {
  for (int64_t r = 0; r < count; r += kLanes)
    transpose(panel + r, lanes, width, std::min(kLanes, count - r), rows + r * width, width);
}

namespace {

// One strip of outputs, some inputs at a time.
template <class Product>
void multiply_strip(Strided part, int64_t count, int64_t inputs, const float* x, int64_t lanes, float* y) {
  strip<Product, true>(part, count, std::min(kInputs, inputs), x, lanes, lanes, y);
  for (int64_t i = kInputs; i < inputs; i += kInputs) {
    part.data += kInputs * part.input_stride;
    strip<Product, false>(part, count, std::min(kInputs, inputs - i), x + i * lanes, lanes, lanes, y);
  }
}

}  // namespace

void multiply_panel(const Weight& w, const void* bias, const float* x, int64_t lanes, float* y, Scratch& scratch) {
  for (int64_t first = 0; first < w.outputs; first += kStrip) {
    const int64_t count = std::min(kStrip, w.outputs - first);
    const Strided part = widened(w, bias, first, count, scratch);
    multiply_strip<Floats>(part, count, w.inputs, x, lanes, y + first * lanes);
  }
}

bool takes_pairs(const Weight& w) {
#ifdef BF16_PRODUCTS
  return w.bfloat16 && w.input_stride == 1 && w.inputs % 2 == 0 && w.output_stride % 2 == 0;
#else
  return false;
#endif
}

void to_pairs(const float* panel, int64_t width, int64_t lanes, float* pairs) {
  auto* bits = reinterpret_cast<uint32_t*>(pairs);
  for (int64_t i = 0; i < width; i += 2)
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float* value = panel + i * lanes + lane;
      bits[i / 2 * lanes + lane] = narrow(value[0]) | static_cast<uint32_t>(narrow(value[lanes])) << 16;
    }
}

void multiply_pairs(const Weight& w, const void* bias, const float* x, int64_t lanes, float* y, Scratch& scratch) {
  float* shift = bias == nullptr ? nullptr : scratch.take(0, w.outputs);
  if (shift != nullptr) load_row(shift, static_cast<const uint16_t*>(bias), w.outputs);
  const Strided all{static_cast<const float*>(w.data), w.output_stride / 2, 1, shift};
  for (int64_t first = 0; first < w.outputs; first += kStrip)
    multiply_strip<Pairs>(all.from(first), std::min(kStrip, w.outputs - first), w.inputs / 2, x, lanes,
                          y + first * lanes);
}

}  // namespace moeca
