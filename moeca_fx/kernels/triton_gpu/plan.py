"""Group the branches to recompute by expert, on the device: a counting sort in two kernels and one prefix sum.

Blocks count their branches by expert; a prefix sum over (expert, block) gives every block its first place for every
expert; blocks then write their branches there. No atomics, so the order is the same at every run, and stable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_fx.kernels.triton_gpu._common import blocks, contiguous, power_of_two

_CELLS = 8192  # (branch, expert) cells that one program ranks


def plan(code: Tensor, slot_expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plan the recomputed branches; shapes do not depend on how many there are.

    Args:
        code: [N, k] int8 decision, 0 is reused.
        slot_expert: [N, k] expert of each slot.
        num_experts: E.

    Returns:
        order [N*k] int64: branch index ``n * k + q`` of each grouped row, reused branches at the tail; offsets [E]
        int32: end row of each expert; count [] int32: rows to compute, a view of the last offset.
    """
    total = code.numel()
    padded = power_of_two(num_experts + 1)  # reused branches are the expert after the last
    block = max(16, min(512, _CELLS // padded))
    programs = max(1, blocks(total, block))
    order = torch.empty(total, dtype=torch.int64, device=code.device)
    counts = torch.empty(padded, programs, dtype=torch.int32, device=code.device)
    code, slot_expert = contiguous(code, slot_expert)
    sizes = {"E": num_experts, "EP": padded, "BLOCK": block, "num_warps": 4}
    _count[(programs,)](code, slot_expert, counts, total, programs, **sizes)
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    _place[(programs,)](code, slot_expert, counts, ends, order, total, programs, **sizes)
    offsets = ends[:num_experts, -1].contiguous()
    return order, offsets, offsets[-1]


@triton.jit
def _one_hot(code_ptr, expert_ptr, branch, total, E: tl.constexpr, EP: tl.constexpr):
    """[BLOCK, EP] int32: 1 at each branch's expert, at E where it is reused, nowhere past the end."""
    real = branch < total
    code = tl.load(code_ptr + branch, mask=real, other=0)
    expert = tl.load(expert_ptr + branch, mask=real, other=0).to(tl.int32)
    key = tl.where(code > 0, expert, E)
    return ((key[:, None] == tl.arange(0, EP)[None, :]) & real[:, None]).to(tl.int32)


@triton.jit
def _count(code_ptr, expert_ptr, counts_ptr, total, programs, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    hot = _one_hot(code_ptr, expert_ptr, pid * BLOCK + tl.arange(0, BLOCK), total, E, EP)
    tl.store(counts_ptr + tl.arange(0, EP) * programs + pid, tl.sum(hot, axis=0))


@triton.jit
def _place(
    code_ptr,
    expert_ptr,
    counts_ptr,
    ends_ptr,
    order_ptr,
    total,
    programs,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    branch = pid * BLOCK + tl.arange(0, BLOCK)
    hot = _one_hot(code_ptr, expert_ptr, branch, total, E, EP)
    cell = tl.arange(0, EP) * programs + pid
    first = tl.load(ends_ptr + cell) - tl.load(counts_ptr + cell)  # [EP]
    place = first[None, :] + tl.cumsum(hot, axis=0) - 1
    row = tl.sum(hot * place, axis=1)
    tl.store(order_ptr + row, branch.to(tl.int64), mask=branch < total)
