"""`moeca::grouped_linear`: one linear layer per expert over rows grouped by expert.

`torch.nn.functional.grouped_mm` does not serve here: on a CPU in fp32 its meta kernel refuses to compile and its
operand strides must be multiples of 16 bytes. This op takes any strided weight view and costs no copy of the weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("moeca::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Multiply each group of rows with its own weight.

    Args:
        x: [M, K] rows grouped by expert.
        weight: [E, N, K], any strides.
        bias: [E, N] or None.
        offsets: [E] end row of each group; ``offsets[-1] == M``.

    Returns:
        [M, N] with ``out[r] = weight[e] @ x[r] + bias[e]`` for the expert e that owns row r.
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for index, end in enumerate(offsets.tolist()):
        if end > start:
            rows, matrix, target = x[start:end], weight[index].t(), out[start:end]
            if bias is None:
                torch.mm(rows, matrix, out=target)
            else:
                torch.addmm(bias[index], rows, matrix, out=target)
        start = end
    return out


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@register_flop_formula(torch.ops.moeca.grouped_linear)
def _flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * x_shape[0] * weight_shape[1] * weight_shape[2])
