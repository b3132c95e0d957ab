"""`moeca::linear`: a linear layer through the faster of two CPU libraries, chosen by its number of rows."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from moeca_fx.ops.cpu_gemm import onednn_linear


@torch.library.custom_op("moeca::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn_rows: int) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: [.., K].
        weight: [N, K].
        bias: [N] or None.
        onednn_rows: from this many rows on, oneDNN is used (`cpu_gemm.onednn_from_rows`).
    """
    if x.numel() // x.shape[-1] >= onednn_rows:
        return onednn_linear(x, weight, bias)
    return functional.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, onednn_rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.moeca.linear)
def _flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return int(2 * rows * weight_shape[0] * weight_shape[1])
