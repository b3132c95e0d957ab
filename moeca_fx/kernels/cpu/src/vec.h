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

inline void store(const Lanes& lanes, float* to) { std::memcpy(to, &lanes, sizeof lanes); }

inline float total(const Vector& lanes) {
  return at::vec::vec_reduce_all<float>([](Vector& a, Vector& b) { return a + b; }, lanes);
}

}  // namespace moeca
