// Attention of one head: a few queries against all keys and values of their sample.
#pragma once

#include <cstdint>

#include "ahead.h"
#include "scratch.h"

namespace moeca {

// Rows of values in fp32 or bf16, a stride apart.
struct Strip {
  const void* data;
  int64_t stride;
  bool bfloat16;
};

struct Head {
  int64_t queries, tokens, width, value_width;
  Strip query, key, value;  // [queries, width], [tokens, width], [tokens, value_width]
  float scale;
  void* out;  // [queries, value_width] in the dtype of the queries
  int64_t out_stride;
};

constexpr int64_t kMostQueries = 64;  // of a head at a time: their scores stay in cache

// out = softmax(scale * query @ key.T) @ value; few queries fetch some lines of `ahead` meanwhile.
void attend(const Head& head, Ahead& ahead, Scratch& scratch);

}  // namespace moeca
