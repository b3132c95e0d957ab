// moeca_cpu:: linears: the own kernel, and the choice between it and two libraries.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "linear.h"

namespace {

using at::Tensor;
using MaybeTensor = const c10::optional<Tensor>&;

template <typename T>
void run(const Tensor& x, const Tensor& weight, MaybeTensor bias, bool narrow, Tensor& out) {
  const moeca::Weight w{weight.data_ptr(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1), narrow};
  const auto* added = bias.has_value() ? static_cast<const T*>(bias->data_ptr()) : nullptr;
  moeca::linear(static_cast<const T*>(x.data_ptr()), x.numel() / x.size(-1), w, added, static_cast<T*>(out.data_ptr()),
                at::get_num_threads());
}

Tensor own_linear(const Tensor& x_, const Tensor& weight, MaybeTensor bias_) {
  const Tensor x = x_.contiguous();
  const auto bias = bias_.has_value() ? c10::optional<Tensor>(bias_->contiguous()) : std::nullopt;
  const bool narrow = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK((narrow || x.scalar_type() == at::kFloat) && weight.scalar_type() == x.scalar_type(),
              "moeca_cpu: expected rows and weight in float32 or both in bfloat16, found ", x.scalar_type(), " and ",
              weight.scalar_type());
  TORCH_CHECK(weight.dim() == 2 && x.size(-1) == weight.size(1) &&
                  (!bias.has_value() || (bias->numel() == weight.size(0) && bias->scalar_type() == x.scalar_type())),
              "moeca_cpu: expected a weight [N, K] and a bias [N] in the dtype of the rows [.., K]");
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor out = at::empty(shape, x.options());
  if (out.numel() == 0) return out;
  if (narrow)
    run<uint16_t>(x, weight, bias, narrow, out);
  else
    run<float>(x, weight, bias, narrow, out);
  return out;
}

// oneDNN's fp32 linear, which torch brings and does not choose by itself.
Tensor onednn(const Tensor& x, const Tensor& weight, MaybeTensor bias) {
  using Signature = Tensor(const Tensor&, const Tensor&, MaybeTensor, c10::string_view,
                           c10::List<c10::optional<at::Scalar>>, c10::optional<c10::string_view>);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Signature>();
  return op.call(x, weight, bias, "none", c10::List<c10::optional<at::Scalar>>(), "");
}

Tensor chosen_linear(const Tensor& x, const Tensor& weight, MaybeTensor bias, int64_t own_up_to,
                     c10::optional<int64_t> onednn_from) {
  const int64_t rows = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  if (rows == 0) return at::linear(x, weight, bias);
  if (rows <= own_up_to) return own_linear(x, weight, bias);
  if (onednn_from.has_value() && rows >= *onednn_from) return onednn(x.contiguous(), weight, bias);
  return at::linear(x, weight, bias);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moeca_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("chosen_linear(Tensor x, Tensor weight, Tensor? bias, int own_up_to, int? onednn_from) -> Tensor");
}

TORCH_LIBRARY_IMPL(moeca_cpu, CPU, m) {
  m.impl("linear", own_linear);
  m.impl("chosen_linear", chosen_linear);
}
