// Attention of a few query rows against all keys and values of their sample.
#pragma once

#include <cstdint>

#include "panel.h"

namespace moeca {

struct AttentionRows {
  int64_t rows, samples, tokens, heads, kv_heads, width, value_width;
  const void *query, *key, *value;  // [rows, heads, width], [samples, tokens, kv_heads, width or value_width]
  bool bfloat16;
  const int64_t* row;  // ascending flat token index of each query
  float scale;
  void* out;  // [rows, heads, value_width]
};

void attention_rows(const AttentionRows& a, int threads);

}  // namespace moeca
