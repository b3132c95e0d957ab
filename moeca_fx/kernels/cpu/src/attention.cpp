#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "attend.h"

namespace moeca {
namespace {

int64_t bytes_of(const Heads& t) { return t.bfloat16 ? 2 : 4; }

const void* at(const Heads& t, int64_t place) { return static_cast<const char*>(t.data) + place * bytes_of(t); }

// Some queries of one sample, one head, from `query` on; the first of them is row `begin` of `out`.
void run(const Attention& a, int64_t sample, int64_t head, const void* query, int64_t begin, int64_t queries,
         Ahead& ahead) {
  const int64_t kv = head / (a.heads / a.kv_heads), out_row = a.heads * a.value_width;
  auto of_sample = [&](const Heads& t) {
    return Strip{at(t, sample * t.sample + kv * t.head), t.token, t.bfloat16};
  };
  void* out = static_cast<char*>(a.out) + (begin * out_row + head * a.value_width) * bytes_of(a.query);
  attend({queries, a.tokens, a.width, a.value_width, {query, a.query.token, a.query.bfloat16}, of_sample(a.key),
          of_sample(a.value), a.scale, out, out_row},
         ahead, scratch_of_thread());
}

// Keys and values of a sample, where each lie together.
Ahead sample_of(const Attention& a, int64_t sample) {
  auto bytes = [&](const Heads& t, int64_t width) {
    const int64_t values = a.tokens * a.kv_heads * width;
    return t.sample == values ? values * bytes_of(t) : 0;
  };
  return {at(a.key, sample * a.key.sample), bytes(a.key, a.width), at(a.value, sample * a.value.sample),
          bytes(a.value, a.value_width)};
}

}  // namespace

void attention(const Attention& a, int threads) {
  const int64_t blocks = (a.queries + kMostQueries - 1) / kMostQueries, each = a.heads * blocks;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (a.samples * each > 1)
  for (int64_t t = 0; t < a.samples * each; ++t) {
    const int64_t sample = t / each, head = t % each / blocks, first = t % blocks * kMostQueries;
    Ahead nothing;
    const int64_t place = sample * a.query.sample + head * a.query.head + first * a.query.token;
    run(a, sample, head, at(a.query, place), sample * a.queries + first,
        std::min(kMostQueries, a.queries - first), nothing);
  }
}

void attention_rows(const Attention& a, const int64_t* row, int64_t rows, int threads) {
  // Blocks of rows of one sample: rows ascend, so those of a sample are neighbours.
  std::vector<int64_t> starts;
  for (int64_t r = 0; r < rows; ++r)
    if (r == 0 || row[r] / a.tokens != row[starts.back()] / a.tokens || r - starts.back() == kMostQueries)
      starts.push_back(r);
  const int64_t blocks = static_cast<int64_t>(starts.size()), tasks = blocks * a.heads;
  starts.push_back(rows);
  const bool together = blocks >= 4 * threads;  // heads of a token are neighbours in memory
#pragma omp parallel num_threads(threads) if (tasks > 4)
  {
    Ahead ahead;
#pragma omp for schedule(dynamic, together ? a.heads : 1)
    for (int64_t t = 0; t < tasks; ++t) {
      const int64_t head = t % a.heads, block = t / a.heads, begin = starts[block], end = starts[block + 1];
      if (together && head == 0) {
        const int64_t next = block + threads;  // most likely this thread's
        ahead = next < blocks ? sample_of(a, row[starts[next]] / a.tokens) : Ahead();
      }
      const void* query = at(a.query, begin * a.query.token + head * a.query.head);
      run(a, row[begin] / a.tokens, head, query, begin, end - begin, ahead);
    }
  }
}

}  // namespace moeca
