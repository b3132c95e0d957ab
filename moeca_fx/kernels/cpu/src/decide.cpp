#include "decide.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "panel.h"
#include "transpose.h"
#include "vec.h"

namespace moeca {
namespace {

enum Slot { kWidened, kPanel, kActivation };

// The slot of each branch: its own where its expert is kept, else the next slot whose expert left.
void match(const int64_t* expert, const int64_t* cached, int64_t k, int64_t* slot, bool* matched) {
  bool taken[kMostSlots] = {};
  for (int64_t p = 0; p < k; ++p) {
    matched[p] = false;
    for (int64_t q = 0; q < k; ++q) {
      if (cached[q] == expert[p]) {
        taken[q] = true;
        if (!matched[p]) slot[p] = q;
        matched[p] = true;
      }
    }
  }
  int64_t next = 0;
  for (int64_t p = 0; p < k; ++p) {
    if (matched[p]) continue;
    while (next < k && taken[next]) ++next;
    slot[p] = next < k ? next++ : 0;  // none is free only where a cache holds one expert twice
  }
}

float sum(const float* values, int64_t k) {
  float total = 0.0f;
  for (int64_t p = 0; p < k; ++p) total += values[p];
  return total;
}

void decide_token(const Decision& d, int64_t token) {
  const int64_t k = d.top_k, base = token * k;
  bool matched[kMostSlots];
  int64_t* slot = d.slot + base;
  match(d.expert + base, d.cached_expert + base, k, slot, matched);
  for (int64_t q = base; q < base + k; ++q) {
    d.slot_expert[q] = 0;
    d.slot_weight[q] = 0.0f;
    d.code[q] = 2;
  }
  const float total = d.share ? sum(d.weight + base, k) : 1.0f;
  const float norms = d.cached_norm == nullptr ? 0.0f : sum(d.cached_norm + base, k);
  for (int64_t p = 0; p < k; ++p) {
    const int64_t q = base + slot[p];
    const int64_t expert = d.expert[base + p];
    const float weight = total == 0.0f ? 0.0f : d.weight[base + p] / total;
    int8_t code = 2;
    bool stays = false;
    if (matched[p] && d.picked != nullptr) {
      code = d.picked[q] ? 1 : 0;
    } else if (matched[p]) {
      const float contribution = norms == 0.0f ? 0.0f : d.cached_norm[q] / norms;
      const float score = weight + d.lambda1 * std::fabs(weight - d.cached_weight[q]) + d.lambda2 * contribution;
      code = score > d.threshold[token / d.tokens_a_sample * d.experts + expert] ? 1 : 0;
    } else if (d.sticky) {
      stays = weight - d.cached_weight[q] <= d.margin;
    }
    d.slot_expert[q] = stays ? d.cached_expert[q] : expert;
    d.slot_weight[q] = weight;
    d.code[q] = stays ? 0 : code;
  }
}

// Entropy of one expert's activation over the tokens, in nats.
float entropy(const float* activation, int64_t tokens) {
  Vector lanes(0.0f);
  for (int64_t t = 0; t < tokens; t += Vector::size())
    lanes = lanes + Vector::loadu(activation + t, std::min<int64_t>(Vector::size(), tokens - t));
  const float mass = total(lanes);
  if (mass == 0.0f) return 0.0f;
  const Vector scale(mass), zero(0.0f), one(1.0f);
  lanes = Vector(0.0f);
  for (int64_t t = 0; t < tokens; t += Vector::size()) {
    const Vector share = Vector::loadu(activation + t, std::min<int64_t>(Vector::size(), tokens - t)) / scale;
    const Vector safe = Vector::blendv(share, one, share == zero);
    lanes = lanes - share * safe.log();
  }
  return total(lanes);
}

// One sample's activation [experts, tokens] after `chosen` [tokens, top_k].
void add_choices(float* activation, const int64_t* chosen, int64_t experts, int64_t tokens, int64_t top_k, float beta) {
  for (int64_t i = 0; i < experts * tokens; ++i) activation[i] *= beta;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t p = 0; p < top_k; ++p) activation[chosen[t * top_k + p] * tokens + t] += 1.0f - beta;
}

}  // namespace

void decide(const Decision& d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (d.tokens > 256)
  for (int64_t token = 0; token < d.tokens; ++token) decide_token(d, token);
}

void update_activation(float* activation, const int64_t* expert, int64_t samples, int64_t experts, int64_t tokens,
                       int64_t top_k, float beta, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (samples > 1)
  for (int64_t b = 0; b < samples; ++b)
    add_choices(activation + b * experts * tokens, expert + b * tokens * top_k, experts, tokens, top_k, beta);
}

void threshold(const float* activation, const int64_t* expert, int64_t samples, int64_t experts, int64_t tokens,
               int64_t top_k, float beta, float tau0, float alpha, bool log_norm, float alike, float* out,
               int threads) {
  const int64_t size = experts * tokens;
#pragma omp parallel for schedule(static) num_threads(threads) if (samples > 1)
  for (int64_t b = 0; b < samples; ++b) {
    float* now = scratch_of_thread().take(kActivation, size);
    std::copy_n(activation + b * size, size, now);
    add_choices(now, expert + b * tokens * top_k, experts, tokens, top_k, beta);
    float* own = out + b * experts;
    for (int64_t e = 0; e < experts; ++e) own[e] = entropy(now + e * tokens, tokens);
    const float low = *std::min_element(own, own + experts), high = *std::max_element(own, own + experts);
    const float span = high - low, most = std::log(static_cast<float>(tokens));
    for (int64_t e = 0; e < experts; ++e) {
      float scaled;
      if (log_norm)
        scaled = tokens > 1 ? own[e] / most : 0.5f;
      else
        scaled = span <= alike ? 0.5f : (own[e] - low) / span;
      own[e] = tau0 * (1.0f + alpha * (2.0f * scaled - 1.0f));
    }
  }
}

namespace {

// Insertion, one value at a time: right for every value, NaN and infinities too.
void top_k_any(const float* row, int64_t columns, int64_t k, float* top, int64_t* where) {
  int64_t held = 0;
  for (int64_t c = 0; c < columns; ++c) {
    const float value = row[c];
    // NaN compares false with everything, so `!(value <= last)` lets it in.
    if (held == k && (value <= top[k - 1] || std::isnan(top[k - 1]))) continue;
    int64_t at = held < k ? held++ : k - 1;
    while (at > 0 && !std::isnan(top[at - 1]) && !(value <= top[at - 1])) {
      top[at] = top[at - 1];
      where[at] = where[at - 1];
      --at;
    }
    top[at] = value;
    where[at] = c;
  }
}

using Whole = int32_t __attribute__((vector_size(sizeof(Lanes))));  // one a lane, as wide as `Lanes`

// Whether every value of a panel is finite: a sum of magnitudes is then finite too, or merely too large.
bool all_finite(const float* panel, int64_t columns) {
  Lanes sum{};
  for (int64_t c = 0; c < columns; ++c) {
    const Lanes value = load(panel + c * kLanes);
    sum += value < 0.0f ? -value : value;
  }
  for (int64_t lane = 0; lane < kLanes; ++lane)
    if (!std::isfinite(sum[lane])) return false;
  return true;
}

// The k largest of every lane's column, one after the other; the winner leaves the panel. Ties go to the first.
void top_k_panel(float* panel, int64_t columns, int64_t k, int64_t rows, float* top, int64_t* where) {
  for (int64_t p = 0; p < k; ++p) {
    Lanes high = load(panel);
    Whole winner{};
    for (int64_t c = 1; c < columns; ++c) {
      const Lanes value = load(panel + c * kLanes);
      const Whole above = value > high;
      high = above ? value : high;
      winner = above ? Whole{} + static_cast<int32_t>(c) : winner;
    }
    for (int64_t lane = 0; lane < rows; ++lane) {
      top[lane * k + p] = high[lane];
      where[lane * k + p] = winner[lane];
      panel[winner[lane] * kLanes + lane] = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace

void top_k(const float* values, int64_t rows, int64_t columns, int64_t k, float* best, int64_t* index, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > 4096)
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t some = std::min(kLanes, rows - first);
    const float* block = values + first * columns;
    float* panel = scratch_of_thread().take(kPanel, kLanes * columns);
    to_panel(block, some, columns, panel);
    if (all_finite(panel, columns)) {
      top_k_panel(panel, columns, k, some, best + first * k, index + first * k);
    } else {
      for (int64_t r = 0; r < some; ++r)
        top_k_any(block + r * columns, columns, k, best + (first + r) * k, index + (first + r) * k);
    }
  }
}

}  // namespace moeca
