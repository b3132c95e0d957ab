// oneDNN's fp32 linear, which torch brings and does not choose by itself.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using MaybeTensor = const c10::optional<Tensor>&;

Tensor onednn(const Tensor& x, const Tensor& weight, MaybeTensor bias) {
  using Signature = Tensor(const Tensor&, const Tensor&, MaybeTensor, c10::string_view,
                           c10::List<c10::optional<at::Scalar>>, c10::optional<c10::string_view>);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Signature>();
  return op.call(x, weight, bias, "none", c10::List<c10::optional<at::Scalar>>(), "");
}

Tensor onednn_linear(const Tensor& x, const Tensor& weight, MaybeTensor bias, int64_t from_rows) {
  const bool few = x.numel() < from_rows * x.size(-1) || x.numel() == 0;
  return few ? at::linear(x, weight, bias) : onednn(x.contiguous(), weight, bias);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moeca_cpu, m) {
  m.def("onednn_linear(Tensor x, Tensor weight, Tensor? bias, int from_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(moeca_cpu, CPU, m) { m.impl("onednn_linear", onednn_linear); }
