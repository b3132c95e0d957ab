// moeca_cpu:: operators: torch tensors in, plain kernels called, torch tensors out.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention.h"
#include "decide.h"
#include "experts.h"
#include "norm.h"

namespace {

using at::Tensor;
using c10::optional;
using MaybeTensor = const optional<Tensor>&;

bool is_bfloat16(const Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16,
              "moeca_cpu: expected float32 or bfloat16, found ", t.scalar_type());
  return t.scalar_type() == at::kBFloat16;
}

// Whether values have the dtype of those that they meet, or are read from a cache in bfloat16.
bool is_alike_or_stored(const Tensor& t, const Tensor& other) {
  return t.scalar_type() == other.scalar_type() || t.scalar_type() == at::kBFloat16;
}

template <typename T>
T* data_or_null(MaybeTensor t) {
  return t.has_value() ? t->data_ptr<T>() : nullptr;
}

optional<Tensor> contiguous(MaybeTensor t) {
  return t.has_value() ? optional<Tensor>(t->contiguous()) : std::nullopt;
}

moeca::Stack stack_of(MaybeTensor weight, MaybeTensor bias) {
  moeca::Stack stack;
  if (!weight.has_value()) return stack;
  const Tensor& w = *weight;
  TORCH_CHECK(w.dim() == 3 && (w.stride(2) == 1 || w.stride(1) == 1),
              "moeca_cpu: expected stacked weights [E, N, K] with one unit stride, found strides ", w.strides());
  stack.weight = {w.data_ptr(), w.size(1), w.size(2), w.stride(1), w.stride(2), is_bfloat16(w)};
  stack.step = w.stride(0);
  if (bias.has_value()) {
    TORCH_CHECK(bias->stride(1) == 1 && bias->scalar_type() == w.scalar_type(),
                "moeca_cpu: expected biases [E, N] with unit inner stride in the weights' dtype");
    stack.bias = bias->data_ptr();
    stack.bias_step = bias->stride(0);
  }
  return stack;
}

moeca::Experts experts_of(MaybeTensor gate, MaybeTensor gate_bias, const Tensor& up, MaybeTensor up_bias,
                          const Tensor& down, MaybeTensor down_bias, int64_t activation) {
  return {up.size(0), stack_of(gate, gate_bias), stack_of(up, up_bias), stack_of(down, down_bias),
          static_cast<moeca::Activation>(activation)};
}

moeca::Rows rows_of(const Tensor& t) { return {t.data_ptr(), t.size(-1), is_bfloat16(t)}; }

void check_ids(const Tensor& expert, int64_t experts) {
  const int64_t* ids = expert.data_ptr<int64_t>();
  for (int64_t i = 0; i < expert.numel(); ++i)
    TORCH_CHECK_INDEX(ids[i] >= 0 && ids[i] < experts, "moeca_cpu: expected expert ids from 0 to ", experts - 1,
                      ", found ", ids[i]);
}

void check_widths(const Tensor& x, MaybeTensor gate, const Tensor& up, const Tensor& down) {
  TORCH_CHECK(x.size(-1) == up.size(2) && down.size(2) == up.size(1) && down.size(0) == up.size(0) &&
                  (!gate.has_value() || gate->sizes() == up.sizes()),
              "moeca_cpu: expected rows [.., H], gate and up [E, I, H] and down [E, O, I], found ", x.sizes(), ", ",
              up.sizes(), " and ", down.sizes());
}

int threads() { return at::get_num_threads(); }

std::tuple<Tensor, Tensor> branches(const Tensor& x_, const Tensor& expert_, MaybeTensor gate, MaybeTensor gate_bias,
                                    const Tensor& up, MaybeTensor up_bias, const Tensor& down, MaybeTensor down_bias,
                                    int64_t activation) {
  const Tensor x = x_.contiguous(), expert = expert_.contiguous();
  const int64_t tokens = x.numel() / x.size(-1), count = expert.numel();
  check_widths(x, gate, up, down);
  Tensor out = at::empty({count, down.size(1)}, x.options());
  Tensor norm = at::empty({count}, x.options().dtype(at::kFloat));
  if (count == 0) return {out, norm};
  const auto all = experts_of(gate, gate_bias, up, up_bias, down, down_bias, activation);
  const auto plan = moeca::group_branches(expert.data_ptr<int64_t>(), nullptr, 0, count, all.count);
  moeca::run_branches(all, plan, rows_of(x), count / tokens, nullptr, rows_of(out), norm.data_ptr<float>(), threads());
  return {out, norm};
}

Tensor mixture(const Tensor& x_, const Tensor& expert_, const Tensor& weight_, MaybeTensor gate,
               MaybeTensor gate_bias, const Tensor& up, MaybeTensor up_bias, const Tensor& down,
               MaybeTensor down_bias, int64_t activation) {
  const Tensor x = x_.contiguous(), expert = expert_.contiguous(), weight = weight_.to(at::kFloat).contiguous();
  const int64_t tokens = x.numel() / x.size(-1);
  check_widths(x, gate, up, down);
  TORCH_CHECK(down.size(1) == x.size(-1) && weight.numel() == expert.numel(),
              "moeca_cpu: expected experts that keep the width, and a weight for every branch");
  Tensor out = at::empty(x.sizes(), x.options());
  if (tokens == 0) return out;
  const auto all = experts_of(gate, gate_bias, up, up_bias, down, down_bias, activation);
  moeca::run_mixture(all, expert.data_ptr<int64_t>(), weight.data_ptr<float>(), rows_of(x), tokens,
                     expert.numel() / tokens, rows_of(out), threads());
  return out;
}

Tensor grouped(const Tensor& x_, const Tensor& ends_, MaybeTensor gate, MaybeTensor gate_bias, const Tensor& up,
               MaybeTensor up_bias, const Tensor& down, MaybeTensor down_bias, int64_t activation) {
  const Tensor x = x_.contiguous(), ends = ends_.contiguous();
  check_widths(x, gate, up, down);
  Tensor out = at::empty({x.size(0), down.size(1)}, x.options());
  if (x.size(0) == 0) return out;
  TORCH_CHECK(ends.numel() == up.size(0) && ends.data_ptr<int64_t>()[ends.numel() - 1] == x.size(0),
              "moeca_cpu: expected an end row for every expert, the last one ", x.size(0));
  const auto all = experts_of(gate, gate_bias, up, up_bias, down, down_bias, activation);
  moeca::run_grouped(all, ends.data_ptr<int64_t>(), rows_of(x), rows_of(out), threads());
  return out;
}

void recompute(Tensor feature, const optional<Tensor>& norm, const Tensor& x_, const Tensor& code_,
               const Tensor& slot_expert_, MaybeTensor row_, MaybeTensor gate, MaybeTensor gate_bias, const Tensor& up,
               MaybeTensor up_bias, const Tensor& down, MaybeTensor down_bias, int64_t activation) {
  const Tensor x = x_.contiguous(), code = code_.contiguous(), slot_expert = slot_expert_.contiguous();
  const auto row = contiguous(row_);
  TORCH_CHECK(feature.is_contiguous(), "moeca_cpu: expected a contiguous feature cache [.., k, H]");
  if (code.numel() == 0) return;
  check_widths(x, gate, up, down);
  const int64_t k = code.size(-1), slots = feature.numel() / std::max<int64_t>(down.size(1), 1);
  TORCH_CHECK(code.numel() == slot_expert.numel() && x.numel() / x.size(-1) == code.numel() / k &&
                  feature.size(-1) == down.size(1) && (!norm.has_value() || (norm->is_contiguous() && norm->numel() == slots)),
              "moeca_cpu: code, experts, rows and caches do not fit each other");
  if (row.has_value()) {
    const int64_t* tokens = row->data_ptr<int64_t>();
    for (int64_t i = 0; i < row->numel(); ++i)
      TORCH_CHECK_INDEX(tokens[i] >= 0 && tokens[i] < slots / k, "moeca_cpu: token row ", tokens[i], " of ", slots / k);
    TORCH_CHECK(row->numel() == code.numel() / k, "moeca_cpu: expected a token row for every row of the decision");
  } else {
    TORCH_CHECK(code.numel() == slots, "moeca_cpu: expected a decision for every slot");
  }
  const auto all = experts_of(gate, gate_bias, up, up_bias, down, down_bias, activation);
  const auto plan = moeca::group_branches(slot_expert.data_ptr<int64_t>(), code.data_ptr<int8_t>(), 0, code.numel(),
                                          all.count);
  float* norms = norm.has_value() ? norm->data_ptr<float>() : nullptr;
  moeca::run_branches(all, plan, rows_of(x), code.size(-1), data_or_null<int64_t>(row), rows_of(feature), norms,
                      threads());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decide(const Tensor& expert_, const Tensor& weight_,
                                                  const Tensor& cached_expert_, const Tensor& cached_weight_,
                                                  MaybeTensor cached_norm_, MaybeTensor threshold_,
                                                  MaybeTensor picked_, double lambda1, double lambda2, bool share,
                                                  optional<double> margin) {
  const Tensor expert = expert_.contiguous(), cached_expert = cached_expert_.contiguous();
  const Tensor weight = weight_.to(at::kFloat).contiguous(), cached_weight = cached_weight_.contiguous();
  const auto norm = contiguous(cached_norm_), threshold = contiguous(threshold_), picked = contiguous(picked_);
  const int64_t k = expert.size(-1);
  TORCH_CHECK(k <= moeca::kMostSlots, "moeca_cpu: at most ", moeca::kMostSlots, " branches a token, found ", k);
  if (threshold.has_value()) check_ids(expert, threshold->size(1));
  Tensor slot = at::empty_like(expert), slot_expert = at::empty_like(expert);
  Tensor slot_weight = at::empty(expert.sizes(), expert.options().dtype(at::kFloat));
  Tensor code = at::empty(expert.sizes(), expert.options().dtype(at::kChar));
  moeca::Decision d{};
  d.tokens = expert.numel() / k;
  d.tokens_a_sample = expert.size(1);
  d.top_k = k;
  d.experts = threshold.has_value() ? threshold->size(1) : 0;
  d.expert = expert.data_ptr<int64_t>();
  d.cached_expert = cached_expert.data_ptr<int64_t>();
  d.weight = weight.data_ptr<float>();
  d.cached_weight = cached_weight.data_ptr<float>();
  d.cached_norm = data_or_null<float>(norm);
  d.threshold = data_or_null<float>(threshold);
  d.picked = data_or_null<bool>(picked);
  d.share = share;
  d.lambda1 = static_cast<float>(lambda1);
  d.lambda2 = static_cast<float>(lambda2);
  d.sticky = margin.has_value();
  d.margin = static_cast<float>(margin.value_or(0.0));
  d.slot = slot.data_ptr<int64_t>();
  d.slot_expert = slot_expert.data_ptr<int64_t>();
  d.slot_weight = slot_weight.data_ptr<float>();
  d.code = code.data_ptr<int8_t>();
  moeca::decide(d, threads());
  return {slot, slot_expert, slot_weight, code};
}

Tensor threshold(const Tensor& activation_, const Tensor& expert_, double beta, double tau0, double alpha,
                 bool log_norm, double alike) {
  const Tensor activation = activation_.contiguous(), expert = expert_.contiguous();
  check_ids(expert, activation.size(1));
  Tensor out = at::empty({activation.size(0), activation.size(1)}, activation.options());
  moeca::threshold(activation.data_ptr<float>(), expert.data_ptr<int64_t>(), activation.size(0), activation.size(1),
                   activation.size(2), expert.size(-1), static_cast<float>(beta), static_cast<float>(tau0),
                   static_cast<float>(alpha), log_norm, static_cast<float>(alike), out.data_ptr<float>(), threads());
  return out;
}

void update_activation(Tensor activation, const Tensor& expert_, double beta) {
  const Tensor expert = expert_.contiguous();
  TORCH_CHECK(activation.is_contiguous(), "moeca_cpu: expected a contiguous activation [B, E, T]");
  check_ids(expert, activation.size(1));
  moeca::update_activation(activation.data_ptr<float>(), expert.data_ptr<int64_t>(), activation.size(0),
                           activation.size(1), activation.size(2), expert.size(-1), static_cast<float>(beta),
                           threads());
}

std::tuple<Tensor, Tensor> top_k(const Tensor& values_, int64_t k) {
  const Tensor values = values_.contiguous();
  auto shape = values.sizes().vec();
  const int64_t columns = shape.back();
  TORCH_CHECK(k >= 1 && k <= columns, "moeca_cpu: top-k of ", k, " among ", columns);
  shape.back() = k;
  Tensor best = at::empty(shape, values.options()), index = at::empty(shape, values.options().dtype(at::kLong));
  moeca::top_k(values.data_ptr<float>(), values.numel() / columns, columns, k, best.data_ptr<float>(),
               index.data_ptr<int64_t>(), threads());
  return {best, index};
}

Tensor with_unit_width(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

// What queries [.., heads, .., width] ask of keys and values, whose axes are where `token` and `head` say.
moeca::Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value, optional<double> scale,
                              int64_t token, int64_t head) {
  TORCH_CHECK(is_alike_or_stored(key, query) && value.scalar_type() == key.scalar_type() &&
                  key.size(3) == query.size(-1) && query.size(1) % key.size(head) == 0 &&
                  value.size(head) == key.size(head) && value.size(token) == key.size(token) &&
                  value.size(0) == key.size(0),
              "moeca_cpu: query, key and value do not fit each other");
  moeca::Attention a{};
  a.samples = key.size(0);
  a.tokens = key.size(token);
  a.heads = query.size(1);
  a.kv_heads = key.size(head);
  a.width = key.size(3);
  a.value_width = value.size(3);
  a.key = {key.data_ptr(), key.stride(0), key.stride(head), key.stride(token), is_bfloat16(key)};
  a.value = {value.data_ptr(), value.stride(0), value.stride(head), value.stride(token), is_bfloat16(value)};
  a.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(a.width))));
  return a;
}

Tensor attention(const Tensor& query_, const Tensor& key_, const Tensor& value_, optional<double> scale) {
  const Tensor query = with_unit_width(query_), key = with_unit_width(key_), value = with_unit_width(value_);
  TORCH_CHECK(query.size(0) == key.size(0), "moeca_cpu: queries of ", query.size(0), " samples, keys of ", key.size(0));
  moeca::Attention a = attention_of(query, key, value, scale, 2, 1);
  Tensor out = at::empty({a.samples, query.size(2), a.heads, a.value_width}, query.options());
  a.queries = query.size(2);
  a.query = {query.data_ptr(), query.stride(0), query.stride(1), query.stride(2), is_bfloat16(query)};
  a.out = out.data_ptr();
  if (out.numel() > 0) moeca::attention(a, threads());
  return out.transpose(1, 2);
}

Tensor attention_rows(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& row_,
                      optional<double> scale) {
  const Tensor query = with_unit_width(query_), key = with_unit_width(key_), value = with_unit_width(value_);
  const Tensor row = row_.contiguous();
  moeca::Attention a = attention_of(query, key, value, scale, 1, 2);
  TORCH_CHECK(row.numel() == query.size(0), "moeca_cpu: ", query.size(0), " queries and ", row.numel(), " rows");
  const int64_t* tokens = row.data_ptr<int64_t>();
  for (int64_t i = 0; i < row.numel(); ++i)
    TORCH_CHECK_INDEX(tokens[i] >= 0 && tokens[i] < a.samples * a.tokens, "moeca_cpu: no token row ", tokens[i]);
  Tensor out = at::empty({query.size(0), a.heads, a.value_width}, query.options());
  a.query = {query.data_ptr(), 0, query.stride(1), query.stride(0), is_bfloat16(query)};
  a.out = out.data_ptr();
  if (row.numel() > 0) moeca::attention_rows(a, tokens, row.numel(), threads());
  return out;
}

moeca::Modulation modulation_of(MaybeTensor t, const Tensor& x) {
  moeca::Modulation m;
  if (!t.has_value()) return m;
  TORCH_CHECK(t->dim() == 3 && t->stride(2) == 1 && t->scalar_type() == x.scalar_type() && t->size(2) == x.size(2),
              "moeca_cpu: expected a modulation [B, 1, H] in the dtype of the tokens");
  TORCH_CHECK((t->size(0) == 1 || t->size(0) == x.size(0)) && (t->size(1) == 1 || t->size(1) == x.size(1)),
              "moeca_cpu: a modulation of ", t->sizes(), " does not fit tokens of ", x.sizes());
  m.data = t->data_ptr();
  m.sample_stride = t->size(0) == 1 ? 0 : t->stride(0);
  m.token_stride = t->size(1) == 1 ? 0 : t->stride(1);
  return m;
}

Tensor run_norm(const Tensor& x, const optional<Tensor>& y, MaybeTensor gate, const Tensor& factor,
                const Tensor& shift, double eps, void* stream) {
  TORCH_CHECK(x.dim() == 3 && (!y.has_value() || (y->sizes() == x.sizes() && is_alike_or_stored(*y, x))),
              "moeca_cpu: expected tokens [B, T, H] and what is added to them alike, or stored in bfloat16");
  Tensor out = at::empty(x.sizes(), x.options());
  moeca::AdaNorm a{};
  a.samples = x.size(0);
  a.tokens = x.size(1);
  a.width = x.size(2);
  a.x = x.data_ptr();
  a.y = y.has_value() ? y->data_ptr() : nullptr;
  a.gate = modulation_of(gate, x);
  a.factor = modulation_of(factor, x);
  a.shift = modulation_of(shift, x);
  a.eps = eps;
  a.bfloat16 = is_bfloat16(x);
  a.y_bfloat16 = y.has_value() && is_bfloat16(*y);
  a.stream = stream;
  a.out = out.data_ptr();
  moeca::ada_norm(a, threads());
  return out;
}

Tensor modulated_norm(const Tensor& x, const Tensor& factor, const Tensor& shift, double eps) {
  return run_norm(x.contiguous(), std::nullopt, std::nullopt, factor, shift, eps, nullptr);
}

std::tuple<Tensor, Tensor> gated_norm(const Tensor& x_, const Tensor& gate, const Tensor& y_, const Tensor& factor,
                                      const Tensor& shift, double eps) {
  const Tensor x = x_.contiguous(), y = y_.contiguous();
  Tensor stream = at::empty(x.sizes(), x.options());
  Tensor out = run_norm(x, y, gate, factor, shift, eps, stream.data_ptr());
  return {stream, out};
}

}  // namespace

#define EXPERTS "Tensor? gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, int activation"

TORCH_LIBRARY(moeca_cpu, m) {
  m.def("branches(Tensor x, Tensor expert, " EXPERTS ") -> (Tensor, Tensor)");
  m.def("mixture(Tensor x, Tensor expert, Tensor weight, " EXPERTS ") -> Tensor");
  m.def("grouped(Tensor x, Tensor ends, " EXPERTS ") -> Tensor");
  m.def("recompute(Tensor(a!) feature, Tensor(b!)? norm, Tensor x, Tensor code, Tensor slot_expert, Tensor? row, "
        EXPERTS ") -> ()");
  m.def("decide(Tensor expert, Tensor weight, Tensor cached_expert, Tensor cached_weight, Tensor? cached_norm, "
        "Tensor? threshold, Tensor? picked, float lambda1, float lambda2, bool share, float? margin) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  m.def("threshold(Tensor activation, Tensor expert, float beta, float tau0, float alpha, bool log_norm, float alike) "
        "-> Tensor");
  m.def("update_activation(Tensor(a!) activation, Tensor expert, float beta) -> ()");
  m.def("top_k(Tensor values, int k) -> (Tensor, Tensor)");
  m.def("modulated_norm(Tensor x, Tensor factor, Tensor shift, float eps) -> Tensor");
  m.def("gated_norm(Tensor x, Tensor gate, Tensor y, Tensor factor, Tensor shift, float eps) -> (Tensor, Tensor)");
  m.def("attention(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor");
  m.def("attention_rows(Tensor query, Tensor key, Tensor value, Tensor row, float? scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(moeca_cpu, CPU, m) {
  m.impl("branches", branches);
  m.impl("mixture", mixture);
  m.impl("grouped", grouped);
  m.impl("recompute", recompute);
  m.impl("decide", decide);
  m.impl("threshold", threshold);
  m.impl("update_activation", update_activation);
  m.impl("top_k", top_k);
  m.impl("modulated_norm", modulated_norm);
  m.impl("gated_norm", gated_norm);
  m.impl("attention", attention);
  m.impl("attention_rows", attention_rows);
}
