// MoECa's decisions, token by token: match, score, threshold (Eq. 7, 9, 11, 12), and the router's top-k.
#pragma once

#include <cstdint>

namespace moeca {

struct Decision {
  int64_t tokens, tokens_a_sample, top_k, experts;
  const int64_t *expert, *cached_expert;
  const float *weight, *cached_weight, *cached_norm;
  const float* threshold;  // [samples, experts]; null where `picked` decides
  const bool* picked;
  bool share;          // score with each branch's share of its token's weights
  float lambda1, lambda2;
  bool sticky;         // a new expert must exceed the old score weight by `margin`
  float margin;
  int64_t *slot, *slot_expert;
  float* slot_weight;
  int8_t* code;
};

constexpr int64_t kMostSlots = 128;

void decide(const Decision& d, int threads);

// Threshold of each expert [samples, experts] from activation [samples, experts, tokens] after this routing.
void threshold(const float* activation, const int64_t* expert, int64_t samples, int64_t experts, int64_t tokens,
               int64_t top_k, float beta, float tau0, float alpha, bool log_norm, float alike, float* out, int threads);

// activation = beta * activation + (1 - beta) where the expert was selected, in place.
void update_activation(float* activation, const int64_t* expert, int64_t samples, int64_t experts, int64_t tokens,
                       int64_t top_k, float beta, int threads);

// The k largest of each row, largest first; NaN counts as largest, as torch has it.
void top_k(const float* values, int64_t rows, int64_t columns, int64_t k, float* best, int64_t* index, int threads);

}  // namespace moeca
