#include "tasks.h"

#include <algorithm>

#include "panel.h"

namespace moeca {
namespace {

constexpr int64_t kChunk = 128;      // rows of one product at most: the inputs and both hidden panels stay in cache
constexpr int64_t kFewestRows = 16;  // rows an expert should have in each share of the tokens

}  // namespace

std::vector<Task> cut(const int64_t* starts, const int64_t* ends, int64_t experts) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = ends[e] - starts[e], pieces = std::max<int64_t>((rows + kChunk - 1) / kChunk, 1);
    const int64_t each = lanes_of((rows + pieces - 1) / pieces);  // even pieces of whole vectors
    for (int64_t begin = starts[e]; begin < ends[e]; begin += each)
      tasks.push_back({e, begin, std::min(begin + each, ends[e])});
  }
  return tasks;
}

Division divide(int64_t tokens, int64_t top_k, int64_t experts, int64_t threads) {
  const int64_t rows = tokens * top_k / experts;
  const int64_t whole = std::clamp<int64_t>(rows / kChunk, 1, threads);
  const int64_t groups = std::clamp<int64_t>(threads / whole, 1, std::max<int64_t>(top_k / 2, 1));
  const int64_t most = std::max<int64_t>(rows / kFewestRows, 1);
  return {std::max(whole, std::min(threads / groups, most)), groups};
}

std::vector<std::vector<Task>> balanced(std::vector<Task> tasks, int64_t groups) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.end - a.begin > b.end - b.begin; });
  std::vector<std::vector<Task>> parts(groups);
  std::vector<int64_t> rows(groups, 0);
  for (const Task& task : tasks) {
    const auto least = std::min_element(rows.begin(), rows.end()) - rows.begin();
    parts[least].push_back(task);
    rows[least] += task.end - task.begin;
  }
  for (auto& part : parts)
    std::sort(part.begin(), part.end(), [](const Task& a, const Task& b) { return a.begin < b.begin; });
  return parts;
}

}  // namespace moeca
