// bf16 and fp32 values in memory, fp32 in registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace moeca {

inline float widen(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Round to nearest, ties to even, as torch does; NaN stays NaN.
inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void load_row(float* out, const float* in, int64_t n) { std::memcpy(out, in, n * sizeof(float)); }
inline void load_row(float* out, const uint16_t* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);
}
inline void store_row(float* out, const float* in, int64_t n) { std::memcpy(out, in, n * sizeof(float)); }
inline void store_row(uint16_t* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow(in[i]);
}

}  // namespace moeca
