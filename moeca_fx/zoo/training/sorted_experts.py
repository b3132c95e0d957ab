"""Training runs the experts of a layer over rows sorted by expert, with a backward pass written for a CPU.

The loop of `moeca_fx.zoo.dsmoe.RoutedExperts` gives every product another number of rows, and a CPU's matrix library
prepares a kernel for each new shape, forward and backward: most of a training step. Here an expert's rows are padded to
a multiple of `ROWS`, so that few shapes occur; padding is zero and has weight zero. Rows move by gathering in both
directions, which a CPU does many times faster than adding at indices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_fx.zoo.dsmoe import RoutedExperts

ROWS = 128


class _Scatter(torch.autograd.Function):
    """Rows [M, H] -> padded rows [P, H]; backward gathers, which a CPU does many times faster than adding."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        return grads[0].index_select(0, slot.flatten()).view(*slot.shape, -1).sum(1), None, None


class _Combine(torch.autograd.Function):
    """Padded rows [P, H] and weights [M, k] -> weighted sums [M, H]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight, token, slot)
        branches = padded.index_select(0, slot.flatten()).view(*slot.shape, -1)
        return torch.bmm(weight.unsqueeze(1).to(branches.dtype), branches).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, token, slot = ctx.saved_tensors
        grad = grads[0]
        of_slot = weight.new_zeros(len(token)).index_copy(0, slot.flatten(), weight.flatten()).to(grad.dtype)
        spread = torch.cat([grad, grad.new_zeros(1, grad.shape[1])]).index_select(0, token)
        branches = padded.index_select(0, slot.flatten()).view(*slot.shape, -1)
        per_branch = torch.bmm(branches, grad.unsqueeze(2)).squeeze(2)  # [M, k]
        return spread * of_slot.unsqueeze(1), per_branch.to(weight.dtype), None, None


class _SwiGLUs(torch.autograd.Function):
    """Rows [P, H] sorted by expert, matrices gate and up [E, W, H], down [E, H, W] -> [P, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, ends: list[int]) -> Tensor:
        opened, lifted = (rows.new_empty(len(rows), gate.shape[1]) for _ in range(2))
        for e, part in _parts(ends):
            torch.mm(rows[part], gate[e].t(), out=opened[part])
            torch.mm(rows[part], up[e].t(), out=lifted[part])
        inner, out = F.silu(opened).mul_(lifted), torch.empty_like(rows)
        for e, part in _parts(ends):
            torch.mm(inner[part], down[e].t(), out=out[part])
        ctx.save_for_backward(rows, gate, up, down, opened, lifted, inner)
        ctx.ends = ends
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, down, opened, lifted, inner = ctx.saved_tensors
        d_out, d_inner = grads[0], torch.empty_like(inner)
        d_rows, d_gate, d_up, d_down = (torch.zeros_like(value) for value in (rows, gate, up, down))
        for e, part in _parts(ctx.ends):
            torch.mm(d_out[part], down[e], out=d_inner[part])
            torch.mm(d_out[part].t(), inner[part], out=d_down[e])
        d_opened = torch.ops.aten.silu_backward(d_inner * lifted, opened)
        d_lifted = d_inner.mul_(F.silu(opened))
        for e, part in _parts(ctx.ends):
            torch.mm(d_opened[part], gate[e], out=d_rows[part])
            d_rows[part].addmm_(d_lifted[part], up[e])
            torch.mm(d_opened[part].t(), rows[part], out=d_gate[e])
            torch.mm(d_lifted[part].t(), rows[part], out=d_up[e])
        return d_rows, d_gate, d_up, d_down, None


def _parts(ends: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    for e, (start, end) in enumerate(pairwise([0, *ends])):
        if end > start:
            yield e, slice(start, end)


def _places(index: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Where every branch goes.

    Args:
        index: expert ids [M, k].
        experts: E.

    Returns:
        token [P] (M where no branch landed), slot [M, k] (the row of each branch), and the end of each expert's rows.
    """
    flat = index.flatten()
    order = flat.argsort(stable=True)
    count = torch.bincount(flat, minlength=experts)
    ends = ((count + ROWS - 1) // ROWS * ROWS).cumsum(0)
    shift = ends - (ends.diff(prepend=ends.new_zeros(1)) + count.cumsum(0) - count)
    place = torch.arange(len(flat)) + shift[flat[order]]
    slot = torch.empty_like(flat).index_copy(0, order, place)
    token = torch.full((int(ends[-1]),), len(index)).index_copy(0, place, order // index.shape[1])
    return token, slot.view_as(index), ends.tolist()


def run_sorted(experts: RoutedExperts, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What `RoutedExperts.forward` computes, with gradients: hidden [M, H], index and weight [M, k] -> [M, H]."""
    token, slot, ends = _places(index, experts.num_experts)
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    matrices = (
        torch.stack([getattr(block, name).weight for block in experts.blocks]).to(kind)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    rows = _apply(_Scatter, hidden.to(kind), token, slot)
    out = _apply(_SwiGLUs, rows, *matrices, ends)
    return _apply(_Combine, out, weight, token, slot).to(hidden.dtype)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


@contextmanager
def sorted_experts(model: nn.Module) -> Iterator[None]:
    """Run the routed experts of `model` over sorted rows inside the block; hooks on them still fire."""
    found = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    for experts in found:
        experts.forward = run_sorted.__get__(experts)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for experts in found:
            del experts.forward
