// Short helpers over torch's vector class.
#pragma once

#include <cstdint>
#include <cstring>

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

// Sums in an array stay in registers only where every loop over them is unrolled.
#define UNROLLED _Pragma("GCC unroll 16")

namespace moeca {

using Vector = at::vec::Vectorized<float>;

// As wide, for sums in registers: a compiler does not keep arrays of torch's class there.
typedef float Lanes __attribute__((vector_size(Vector::size() * sizeof(float))));

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// The same of bf16 values, widened.
inline Lanes load(const uint16_t* from) {
  typedef uint16_t Narrow __attribute__((vector_size(sizeof(Lanes) / 2)));
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Lanes))));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const Bits bits = __builtin_convertvector(narrow, Bits) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &bits, sizeof lanes);
  return lanes;
}

// `count` values, zeros beyond.
template <typename T>
inline Lanes load_some(const T* from, int64_t count) {
  alignas(64) T all[Vector::size()] = {};
  std::memcpy(all, from, count * sizeof(T));
  return load(all);
}

inline void store(const Lanes& lanes, float* to) { std::memcpy(to, &lanes, sizeof lanes); }

inline Vector vector_of(const Lanes& lanes) {
  Vector vector;
  std::memcpy(&vector, &lanes, sizeof lanes);
  return vector;
}

inline float total(const Vector& lanes) {
  return at::vec::vec_reduce_all<float>([](Vector& a, Vector& b) { return a + b; }, lanes);
}

}  // namespace moeca
