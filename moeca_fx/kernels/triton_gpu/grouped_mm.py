"""The same experts through `torch.nn.functional.grouped_mm`: what the Triton kernels are compared with.

    rows       = x[order // k]
    feature    = where(r < offsets[-1], down(act(gate(rows)) * up(rows)), feature) at order[r]

Rows past the last offset are uninitialised memory there, so they are replaced before anything is written.
"""

import torch
from torch import Tensor
from torch.nn import functional


def grouped_mm_experts(
    x: Tensor, order: Tensor, offsets: Tensor, top_k: int, gate: Tensor, up: Tensor, down: Tensor, feature: Tensor
) -> None:
    """`gated_experts` with SiLU, without biases and norms; arguments as there.

    Args:
        x, order, offsets, top_k, gate, up, down, feature: bf16, with widths that are multiples of 16 bytes.
    """
    rows = x.index_select(0, order // top_k)
    gated = functional.grouped_mm(rows, gate.transpose(1, 2), offs=offsets)
    raised = functional.grouped_mm(rows, up.transpose(1, 2), offs=offsets)
    out = functional.grouped_mm(functional.silu(gated) * raised, down.transpose(1, 2), offs=offsets)
    live = torch.arange(order.shape[0], device=order.device) < offsets[-1]
    kept = feature.index_select(0, order)
    feature.index_copy_(0, order, torch.where(live.unsqueeze(1), out, kept))
