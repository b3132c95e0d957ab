#include "transpose.h"

#include <algorithm>
#include <cstring>

namespace moeca {
namespace {

// A square of which `rows` rows and `columns` columns are there; `wide` of their values are written, zeros beyond.
template <typename T>
void square_of_some(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                    int64_t to_stride, int64_t wide) {
  Lanes square[kLanes];
  UNROLLED for (int r = 0; r < kLanes; ++r) {
    const T* row = from + r * from_stride;
    square[r] = r >= rows ? Lanes{} : columns == kLanes ? load(row) : load_some(row, columns);
  }
  transpose_square(square);
  UNROLLED for (int c = 0; c < kLanes; ++c)
    if (c < columns) {
      if (wide == kLanes)
        store(square[c], to + c * to_stride);
      else
        std::memcpy(to + c * to_stride, &square[c], wide * sizeof(float));
    }
}

template <typename T>
void whole_square(const T* from, int64_t from_stride, float* to, int64_t to_stride) {
  Lanes square[kLanes];
  UNROLLED for (int r = 0; r < kLanes; ++r) {
    // As many streams as rows are too many for the processor to foresee: what is read, and written, soon.
    __builtin_prefetch(from + r * from_stride + 2 * kLanes, 0, 3);
    __builtin_prefetch(to + r * to_stride + kLanes, 1, 3);
    square[r] = load(from + r * from_stride);
  }
  transpose_square(square);
  UNROLLED for (int c = 0; c < kLanes; ++c) store(square[c], to + c * to_stride);
}

// All squares; of the last rows' either what is there or, with `Padded`, whole vectors.
template <bool Padded, typename T>
void squares(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const T* source = from + r * from_stride + c;
      float* target = to + c * to_stride + r;
      const int64_t m = std::min(kLanes, rows - r), n = std::min(kLanes, columns - c);
      if (m == kLanes && n == kLanes)
        whole_square(source, from_stride, target, to_stride);
      else
        square_of_some(source, from_stride, m, n, target, to_stride, Padded ? kLanes : m);
    }
}

}  // namespace

template <typename T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  squares<false>(from, from_stride, rows, columns, to, to_stride);
}

template void transpose<float>(const float*, int64_t, int64_t, int64_t, float*, int64_t);
template void transpose<uint16_t>(const uint16_t*, int64_t, int64_t, int64_t, float*, int64_t);

void transpose_padded(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  squares<true>(from, from_stride, rows, columns, to, to_stride);
}

}  // namespace moeca
