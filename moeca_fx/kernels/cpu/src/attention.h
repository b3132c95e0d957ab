// Attention of all tokens, or of a few query rows, against all keys and values of their sample.
#pragma once

#include <cstdint>

namespace moeca {

// [samples, heads, tokens, width] in fp32 or bf16, any strides but a unit one along the width; strides in elements.
struct Heads {
  const void* data;
  int64_t sample, head, token;
  bool bfloat16;
};

struct Attention {
  int64_t samples, queries, tokens, heads, kv_heads, width, value_width;
  Heads query, key, value;  // keys and values in one dtype
  float scale;
  void* out;  // [samples, queries, heads, value_width] in the dtype of the queries
};

void attention(const Attention& a, int threads);

// The same of some queries [rows, heads, width]: `query` and `out` hold them one after the other.
void attention_rows(const Attention& a, const int64_t* row, int64_t rows, int threads);

}  // namespace moeca
