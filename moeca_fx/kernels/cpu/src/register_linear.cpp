// moeca_cpu:: linears: the own kernel, and the choice between it and two libraries.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "linear.h"

namespace {

using at::Tensor;
using MaybeTensor = c10::optional<Tensor>;

// Refuses what the own kernels do not take.
void check(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  TORCH_CHECK((x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat) &&
                  weight.scalar_type() == x.scalar_type(),
              "moeca_cpu: expected rows and weight in float32 or both in bfloat16, found ", x.scalar_type(), " and ",
              weight.scalar_type());
  TORCH_CHECK(weight.dim() == 2 && x.size(-1) == weight.size(1) &&
                  (!bias.has_value() || (bias->numel() == weight.size(0) && bias->scalar_type() == x.scalar_type())),
              "moeca_cpu: expected a weight [N, K] and a bias [N] in the dtype of the rows [.., K]");
}

template <typename T>
moeca::Layer<T> layer_of(const Tensor& weight, const MaybeTensor& bias, T* y) {
  const bool narrow = weight.scalar_type() == at::kBFloat16;
  return {{weight.data_ptr(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1), narrow},
          bias.has_value() ? static_cast<const T*>(bias->data_ptr()) : nullptr,
          y};
}

template <typename T>
void run(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, Tensor& out) {
  const auto layer = layer_of(weight, bias, static_cast<T*>(out.data_ptr()));
  moeca::linear(static_cast<const T*>(x.data_ptr()), x.numel() / x.size(-1), layer.weight, layer.bias, layer.y,
                at::get_num_threads());
}

template <typename T>
void run(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<MaybeTensor>& biases, Tensor& out) {
  std::vector<moeca::Layer<T>> layers;
  T* y = static_cast<T*>(out.data_ptr());
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.push_back(layer_of(weights[i], biases[i], y));
    y += out.stride(0);
  }
  moeca::linears(static_cast<const T*>(x.data_ptr()), x.size(0), layers, out.size(2), at::get_num_threads());
}

Tensor own_linear(const Tensor& x_, const Tensor& weight, const MaybeTensor& bias_) {
  const Tensor x = x_.contiguous();
  const MaybeTensor bias = bias_.has_value() ? MaybeTensor(bias_->contiguous()) : std::nullopt;
  check(x, weight, bias);
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor out = at::empty(shape, x.options());
  if (out.numel() == 0) return out;
  if (x.scalar_type() == at::kBFloat16)
    run<uint16_t>(x, weight, bias, out);
  else
    run<float>(x, weight, bias, out);
  return out;
}

// oneDNN's fp32 linear, which torch brings and does not choose by itself.
Tensor onednn(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  using Signature = Tensor(const Tensor&, const Tensor&, const MaybeTensor&, c10::string_view,
                           c10::List<c10::optional<at::Scalar>>, c10::optional<c10::string_view>);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Signature>();
  return op.call(x, weight, bias, "none", c10::List<c10::optional<at::Scalar>>(), "");
}

Tensor chosen_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t own_up_to,
                     c10::optional<int64_t> onednn_from) {
  const int64_t rows = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  if (rows == 0) return at::linear(x, weight, bias);
  if (rows <= own_up_to) return own_linear(x, weight, bias);
  if (onednn_from.has_value() && rows >= *onednn_from) return onednn(x.contiguous(), weight, bias);
  return at::linear(x, weight, bias);
}

// Rows [R, K] through layers [N, K] that share them -> [layers, R, N].
Tensor sibling_linears(const Tensor& x_, const std::vector<Tensor>& weights, const std::vector<MaybeTensor>& biases,
                       int64_t own_up_to, c10::optional<int64_t> onednn_from) {
  TORCH_CHECK(x_.dim() == 2 && !weights.empty(), "moeca_cpu: expected rows [R, K] and a weight");
  const Tensor x = x_.contiguous();
  for (size_t i = 0; i < weights.size(); ++i) {
    check(x, weights[i], biases[i]);
    TORCH_CHECK(weights[i].size(0) == weights[0].size(0), "moeca_cpu: expected siblings of one size, found ",
                weights[0].size(0), " and ", weights[i].size(0), " outputs");
  }
  Tensor out = at::empty({static_cast<int64_t>(weights.size()), x.size(0), weights[0].size(0)}, x.options());
  if (out.numel() == 0) return out;
  if (x.size(0) > std::min(own_up_to, moeca::kSharedRows)) {
    for (size_t i = 0; i < weights.size(); ++i)
      out.select(0, i).copy_(chosen_linear(x, weights[i], biases[i], own_up_to, onednn_from));
  } else if (x.scalar_type() == at::kBFloat16) {
    run<uint16_t>(x, weights, biases, out);
  } else {
    run<float>(x, weights, biases, out);
  }
  return out;
}

constexpr size_t kMostSiblings = 30;  // an operator takes at most 64 arguments, three of them are others

// Weights and biases in turn and not as lists, for which Inductor's C++ wrapper would compile twice as long.
std::string siblings_schema() {
  std::string text = "sibling_linears(Tensor x, int own_up_to, int? onednn_from";
  for (size_t i = 0; i < kMostSiblings; ++i)
    text += ", Tensor? w" + std::to_string(i) + "=None, Tensor? b" + std::to_string(i) + "=None";
  return text + ") -> Tensor";
}

void sibling_linears_of_stack(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const size_t first = stack->size() - (3 + 2 * kMostSiblings);
  const auto argument = [&](size_t i) -> const c10::IValue& { return (*stack)[first + i]; };
  std::vector<Tensor> weights;
  std::vector<MaybeTensor> biases;
  for (size_t i = 3; i < 3 + 2 * kMostSiblings; i += 2) {
    if (argument(i).isNone()) {
      TORCH_CHECK(argument(i + 1).isNone(), "moeca_cpu: a bias without a weight");
      continue;
    }
    weights.push_back(argument(i).toTensor());
    const auto bias = argument(i + 1).toOptional<Tensor>();
    biases.push_back(bias.has_value() ? MaybeTensor(bias->contiguous()) : std::nullopt);
  }
  Tensor out = sibling_linears(argument(0).toTensor(), weights, biases, argument(1).toInt(),
                               argument(2).toOptional<int64_t>());
  stack->resize(first);
  stack->push_back(std::move(out));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moeca_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("chosen_linear(Tensor x, Tensor weight, Tensor? bias, int own_up_to, int? onednn_from) -> Tensor");
  m.def(siblings_schema().c_str());
}

TORCH_LIBRARY_IMPL(moeca_cpu, CPU, m) {
  m.impl("linear", own_linear);
  m.impl("chosen_linear", chosen_linear);
  m.impl("sibling_linears", torch::CppFunction::makeFromBoxedFunction<&sibling_linears_of_stack>());
}
