// How the branches of a layer are divided into pieces of work, and these among threads.
#pragma once

#include <cstdint>
#include <vector>

namespace moeca {

// Rows begin .. end of those that one expert has.
struct Task {
  int64_t expert, begin, end;
};

// Every expert's rows starts[e] .. ends[e], in even pieces of whole vectors.
std::vector<Task> cut(const int64_t* starts, const int64_t* ends, int64_t experts);

// How a mixture is divided among threads: shares of the tokens, and in each share groups of experts. Every pair of them
// has sums of its own, so that no two threads add to one row, in any order.
struct Division {
  int64_t shares, groups;
};

// Shares cost nothing while every expert keeps a whole chunk of rows in each; then groups, whose sums together stay well
// below a value for each branch; then smaller shares.
Division divide(int64_t tokens, int64_t top_k, int64_t experts, int64_t threads);

// Tasks in groups of about as many rows, each in the order of its experts.
std::vector<std::vector<Task>> balanced(std::vector<Task> tasks, int64_t groups);

}  // namespace moeca
