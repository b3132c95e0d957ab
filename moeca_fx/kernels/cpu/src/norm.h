// adaLN in one pass over memory: gated residual, layer norm, scale and shift.
#pragma once

#include <cstdint>

namespace moeca {

// A value for each sample or for each token, [samples, 1 or tokens, width], unit inner stride; may be null.
struct Modulation {
  const void* data = nullptr;
  int64_t sample_stride = 0, token_stride = 0;
};

struct AdaNorm {
  int64_t samples, tokens, width;
  const void* x;  // [samples, tokens, width]
  const void* y;  // likewise, in its own dtype, or null: no residual
  Modulation gate, factor, shift;
  double eps;
  bool bfloat16, y_bfloat16;
  void *stream, *out;  // x + gate * y, and norm(stream) * factor + shift
};

void ada_norm(const AdaNorm& a, int threads);

}  // namespace moeca
