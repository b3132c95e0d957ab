// Routed experts of the form down(act(gate(x)) * up(x)) or down(act(up(x))), expert by expert.
#pragma once

#include <cstdint>

#include "panel.h"

namespace moeca {

enum class Activation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// Stacked weights; `gate.data` and the biases may be null. `step` is the distance between two experts.
struct Stack {
  Weight weight{};
  int64_t step = 0;
  const void* bias = nullptr;
  int64_t bias_step = 0;

  Weight of(int64_t expert) const;
  const void* bias_of(int64_t expert) const;
};

struct Experts {
  int64_t count;
  Stack gate, up, down;
  Activation activation;
};

// Rows in fp32 or bf16, `width` values each, contiguous.
struct Rows {
  void* data;
  int64_t width;
  bool bfloat16;

  void load(float* out, int64_t row) const;
  void store(int64_t row, const float* in) const;
};

// Branches grouped by expert: those of expert e are entries offsets[e] .. offsets[e + 1].
struct Plan {
  std::vector<int64_t> entry;    // branch of each grouped row, as the caller numbers them
  std::vector<int64_t> offsets;  // experts + 1
};

// Group the branches `first .. last` for which `code` (may be null: all) is above zero; stable.
Plan group_branches(const int64_t* expert, const int8_t* code, int64_t first, int64_t last, int64_t experts);

// out[target(entry)] = expert(x[entry / top_k]) for every planned branch; with `norm`, also its L2 norm.
// `token_of` (may be null) maps a local token to the token whose k slots of `out` and `norm` are written.
void run_branches(const Experts& experts, const Plan& plan, const Rows& x, int64_t top_k, const int64_t* token_of,
                  const Rows& out, float* norm, int threads);

// out[r] = expert(x[r]) for rows grouped by expert, offsets [experts] being end rows.
void run_grouped(const Experts& experts, const int64_t* ends, const Rows& x, const Rows& out, int threads);

// y[token] = sum over its k branches of weight * expert(x[token]), without a value for every branch.
void run_mixture(const Experts& experts, const int64_t* expert, const float* weight, const Rows& x, int64_t tokens,
                 int64_t top_k, const Rows& y, int threads);

}  // namespace moeca
