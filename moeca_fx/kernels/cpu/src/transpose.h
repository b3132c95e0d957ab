// Transposition of values in vectors and in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "vec.h"

namespace moeca {

constexpr int64_t kLanes = Vector::size();

// Of a pair of rows whose numbers differ in bit S alone: what the lower or the upper one holds after columns have taken
// that bit's place.
template <int S, bool Upper, size_t... J>
inline Lanes exchanged(const Lanes& lower, const Lanes& upper, std::index_sequence<J...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(lower, upper, (J & S ? J + (Upper ? kLanes : kLanes - S) : J + (Upper ? S : 0))...);
#else
  typedef int32_t Places __attribute__((vector_size(sizeof(Lanes))));
  return __builtin_shuffle(lower, upper, Places{(J & S ? J + (Upper ? kLanes : kLanes - S) : J + (Upper ? S : 0))...});
#endif
}

// rows[kLanes] of a square, transposed in registers: one bit of the place at a time.
template <int S = 1>
inline void transpose_square(Lanes* rows) {
  constexpr std::make_index_sequence<kLanes> places;
  UNROLLED for (int i = 0; i < kLanes; ++i)
    if ((i & S) == 0) {
      const Lanes lower = rows[i], upper = rows[i + S];
      rows[i] = exchanged<S, false>(lower, upper, places);
      rows[i + S] = exchanged<S, true>(lower, upper, places);
    }
  if constexpr (2 * S < kLanes) transpose_square<2 * S>(rows);
}

// out[i] = the sum of lanes of sums[i], all together.
template <int N>
inline void add_lanes(const Lanes* sums, float* out) {
  for (int first = 0; first < N; first += kLanes) {
    const int count = N - first < kLanes ? N - first : kLanes;
    Lanes square[kLanes];
    UNROLLED for (int i = 0; i < kLanes; ++i) square[i] = i < count ? sums[first + i] : Lanes{};
    transpose_square(square);
    Lanes total = square[0];
    UNROLLED for (int i = 1; i < kLanes; ++i) total += square[i];
    std::memcpy(out + first, &total, count * sizeof(float));
  }
}

// to[columns, rows] = from[rows, columns].T, a stride apart each; T is float or uint16_t, which stands for bf16.
template <typename T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride);

// The same, each row of `to` filled up to whole vectors with zeros.
void transpose_padded(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride);

}  // namespace moeca
