// Short helpers over torch's vector class.
#pragma once

#include <cstdint>

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

namespace moeca {

using Vector = at::vec::Vectorized<float>;

inline float total(const Vector& lanes) {
  return at::vec::vec_reduce_all<float>([](Vector& a, Vector& b) { return a + b; }, lanes);
}

}  // namespace moeca
