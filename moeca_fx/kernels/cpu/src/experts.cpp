#include "experts.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "dots.h"
#include "scalar.h"
#include "tasks.h"
#include "vec.h"

namespace moeca {
namespace {

enum Slot { kWidened, kRows, kInput, kGate, kUp, kOutput, kSum };  // kWidened is the panels' own

Vector activated(Activation kind, const Vector& v) {
  const Vector one(1.0f), half(0.5f);
  switch (kind) {
    case Activation::kSilu:
      return v / (one + v.neg().exp());
    case Activation::kGelu:
      return half * v * (one + (v * Vector(static_cast<float>(M_SQRT1_2))).erf());
    case Activation::kGeluTanh: {
      const Vector inner = Vector(0.7978845608028654f) * (v + Vector(0.044715f) * v * v * v);
      return half * v * (one + inner.tanh());
    }
    default:
      return at::vec::maximum(v, Vector(0.0f));
  }
}

// hidden = act(gated) * up, or act(gated) where `up` is null; in place of `gated`.
void activate(Activation kind, float* gated, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += Vector::size()) {
    const int64_t n = std::min<int64_t>(Vector::size(), count - i);
    Vector value = activated(kind, Vector::loadu(gated + i, n));
    if (up != nullptr) value = value * Vector::loadu(up + i, n);
    value.store(gated + i, static_cast<int>(n));
  }
}

// One expert's hidden values from a product of its weights with its input, activated.
template <typename Product>
float* hidden_of(const Experts& experts, int64_t values, Scratch& scratch, const Product& product) {
  float* hidden = scratch.take(kUp, values);
  product(experts.up, hidden);
  if (experts.gate.weight.data == nullptr) {
    activate(experts.activation, hidden, nullptr, values);
    return hidden;
  }
  float* gate = scratch.take(kGate, values);
  product(experts.gate, gate);
  activate(experts.activation, gate, hidden, values);
  return gate;
}

// Rows [rows, width] through one expert; the result lies in scratch and is valid until the next call.
const float* through(const Experts& experts, int64_t expert, float* x, int64_t rows, Scratch& scratch) {
  const Weight up = experts.up.of(expert), down = experts.down.of(expert);
  if (few_rows(rows, up) && few_rows(rows, down)) {
    const float* hidden = hidden_of(experts, rows * up.outputs, scratch, [&](const Stack& stack, float* y) {
      multiply_dots(stack.of(expert), stack.bias_of(expert), x, rows, y, scratch);
    });
    float* out = scratch.take(kOutput, rows * down.outputs);
    multiply_dots(down, experts.down.bias_of(expert), hidden, rows, out, scratch);
    return out;
  }
  const int64_t lanes = lanes_of(rows);
  float* input = scratch.take(kInput, lanes * up.inputs);
  to_panel(x, rows, up.inputs, input);
  const float* hidden = hidden_of(experts, lanes * up.outputs, scratch, [&](const Stack& stack, float* y) {
    multiply_panel(stack.of(expert), stack.bias_of(expert), input, lanes, y, scratch);
  });
  float* product = scratch.take(kOutput, lanes * down.outputs);
  multiply_panel(down, experts.down.bias_of(expert), hidden, lanes, product, scratch);
  float* out = scratch.take(kRows, lanes * down.outputs);  // x has been read
  from_panel(product, lanes, rows, down.outputs, out);
  return out;
}

float norm_of(const float* row, int64_t width) {
  Vector squares(0.0f);
  for (int64_t i = 0; i < width; i += Vector::size()) {
    const Vector value = Vector::loadu(row + i, std::min<int64_t>(Vector::size(), width - i));
    squares = at::vec::fmadd(value, value, squares);
  }
  return std::sqrt(total(squares));
}

// total += weight * row
void accumulate(float* total, const float* row, float weight, int64_t width) {
  const Vector factor(weight);
  for (int64_t i = 0; i < width; i += Vector::size()) {
    const int64_t n = std::min<int64_t>(Vector::size(), width - i);
    at::vec::fmadd(factor, Vector::loadu(row + i, n), Vector::loadu(total + i, n)).store(total + i, static_cast<int>(n));
  }
}

// `through` for rows and weights in bf16, where the processor multiplies these: x [rows, width] as bf16.
const float* through_pairs(const Experts& experts, int64_t expert, float* x, int64_t rows, Scratch& scratch) {
  const Weight up = experts.up.of(expert), down = experts.down.of(expert);
  const int64_t lanes = lanes_of(rows);
  float* input = scratch.take(kInput, lanes * std::max(up.inputs, up.outputs) / 2);
  to_panel(x, rows, up.inputs / 2, input);  // transposes pairs
  float* hidden = hidden_of(experts, lanes * up.outputs, scratch, [&](const Stack& stack, float* y) {
    multiply_pairs(stack.of(expert), stack.bias_of(expert), input, lanes, y, scratch);
  });
  to_pairs(hidden, up.outputs, lanes, input);
  float* product = scratch.take(kOutput, lanes * down.outputs);
  multiply_pairs(down, experts.down.bias_of(expert), input, lanes, product, scratch);
  float* out = scratch.take(kRows, lanes * down.outputs);  // x has been read
  from_panel(product, lanes, rows, down.outputs, out);
  return out;
}

bool in_pairs(const Experts& experts, int64_t rows, const Rows& x) {
  const Weight& up = experts.up.weight;
  const bool gate = experts.gate.weight.data == nullptr || takes_pairs(experts.gate.weight);
  return x.bfloat16 && gate && takes_pairs(up) && takes_pairs(experts.down.weight) && !few_rows(rows, up);
}

// One task's rows through its expert: the result of x[source(i)] for i in begin .. end, valid until the next call.
template <typename Source>
const float* through_rows(const Experts& experts, const Task& task, const Rows& x, const Source& source) {
  Scratch& scratch = scratch_of_thread();
  const int64_t rows = task.end - task.begin, lanes = lanes_of(rows);
  if (in_pairs(experts, rows, x)) {
    float* own = scratch.take(kRows, lanes * x.width / 2);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(own + r * x.width / 2, static_cast<const uint16_t*>(x.data) + source(task.begin + r) * x.width,
                  x.width * sizeof(uint16_t));
    return through_pairs(experts, task.expert, own, rows, scratch);
  }
  float* own = scratch.take(kRows, lanes * x.width);
  for (int64_t r = 0; r < rows; ++r) x.load(own + r * x.width, source(task.begin + r));
  return through(experts, task.expert, own, rows, scratch);
}

}  // namespace

Weight Stack::of(int64_t expert) const {
  Weight own = weight;
  const int64_t size = weight.bfloat16 ? 2 : 4;
  own.data = static_cast<const char*>(weight.data) + expert * step * size;
  return own;
}

const void* Stack::bias_of(int64_t expert) const {
  if (bias == nullptr) return nullptr;
  return static_cast<const char*>(bias) + expert * bias_step * (weight.bfloat16 ? 2 : 4);
}

void Rows::load(float* out, int64_t row) const {
  if (bfloat16)
    load_row(out, static_cast<const uint16_t*>(data) + row * width, width);
  else
    load_row(out, static_cast<const float*>(data) + row * width, width);
}

void Rows::store(int64_t row, const float* in) const {
  if (bfloat16)
    store_row(static_cast<uint16_t*>(data) + row * width, in, width);
  else
    store_row(static_cast<float*>(data) + row * width, in, width);
}

Plan group_branches(const int64_t* expert, const int8_t* code, int64_t first, int64_t last, int64_t experts) {
  Plan plan;
  plan.offsets.assign(experts + 1, 0);
  for (int64_t i = first; i < last; ++i) {
    if (code != nullptr && code[i] <= 0) continue;
    if (expert[i] < 0 || expert[i] >= experts)
      throw std::out_of_range("expected expert ids from 0 to " + std::to_string(experts - 1) + ", found " +
                              std::to_string(expert[i]));
    ++plan.offsets[expert[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) plan.offsets[e + 1] += plan.offsets[e];
  plan.entry.resize(plan.offsets[experts]);
  std::vector<int64_t> next(plan.offsets.begin(), plan.offsets.end() - 1);
  for (int64_t i = first; i < last; ++i)
    if (code == nullptr || code[i] > 0) plan.entry[next[expert[i]]++] = i;
  return plan;
}

void run_branches(const Experts& experts, const Plan& plan, const Rows& x, int64_t top_k, const int64_t* token_of,
                  const Rows& out, float* norm, int threads) {
  const std::vector<Task> tasks = cut(plan.offsets.data(), plan.offsets.data() + 1, experts.count);
  const int64_t count = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (count > 1)
  for (int64_t t = 0; t < count; ++t) {
    const Task task = tasks[t];
    const int64_t rows = task.end - task.begin;
    const float* result = through_rows(experts, task, x, [&](int64_t i) { return plan.entry[i] / top_k; });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t entry = plan.entry[task.begin + r];
      const int64_t target = token_of == nullptr ? entry : token_of[entry / top_k] * top_k + entry % top_k;
      out.store(target, result + r * out.width);
      if (norm != nullptr) norm[target] = norm_of(result + r * out.width, out.width);
    }
  }
}

void run_grouped(const Experts& experts, const int64_t* ends, const Rows& x, const Rows& out, int threads) {
  std::vector<int64_t> starts(experts.count, 0);
  std::copy(ends, ends + experts.count - 1, starts.begin() + 1);
  const std::vector<Task> tasks = cut(starts.data(), ends, experts.count);
  const int64_t count = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (count > 1)
  for (int64_t t = 0; t < count; ++t) {
    const Task task = tasks[t];
    const int64_t rows = task.end - task.begin;
    const float* result = through_rows(experts, task, x, [](int64_t i) { return i; });
    for (int64_t r = 0; r < rows; ++r) out.store(task.begin + r, result + r * out.width);
  }
}

void run_mixture(const Experts& experts, const int64_t* expert, const float* weight, const Rows& x, int64_t tokens,
                 int64_t top_k, const Rows& y, int threads) {
  const Division division = divide(tokens, top_k, experts.count, threads);
  const int64_t shares = division.shares, groups = division.groups, count = shares * groups, size = tokens * y.width;
  std::vector<Plan> plans;  // made out here: what they refuse must not be thrown inside a parallel region
  std::vector<std::vector<Task>> parts;
  for (int64_t share = 0; share < shares; ++share) {
    plans.push_back(group_branches(expert, nullptr, tokens * share / shares * top_k,
                                   tokens * (share + 1) / shares * top_k, experts.count));
    const Plan& plan = plans.back();
    for (auto& part : balanced(cut(plan.offsets.data(), plan.offsets.data() + 1, experts.count), groups))
      parts.push_back(std::move(part));
  }
  float* sums = scratch_of_thread().take(kSum, groups * size);  // [groups, tokens, width]
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(count)) if (count > 1)
  for (int64_t p = 0; p < count; ++p) {
    const int64_t share = p / groups, first = tokens * share / shares, last = tokens * (share + 1) / shares;
    const Plan& plan = plans[share];
    float* sum = sums + p % groups * size;
    std::fill(sum + first * y.width, sum + last * y.width, 0.0f);
    for (const Task& task : parts[p]) {
      const int64_t rows = task.end - task.begin;
      const float* result = through_rows(experts, task, x, [&](int64_t i) { return plan.entry[i] / top_k; });
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t entry = plan.entry[task.begin + r];
        accumulate(sum + entry / top_k * y.width, result + r * y.width, weight[entry], y.width);
      }
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 1)
  for (int64_t token = 0; token < tokens; ++token) {
    float* total = sums + token * y.width;
    for (int64_t group = 1; group < groups; ++group) accumulate(total, total + group * size, 1.0f, y.width);
    y.store(token, total);
  }
}

}  // namespace moeca
