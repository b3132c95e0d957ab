"""MoECa's decision in one kernel: match, score, threshold and slot order of a block of tokens (Eq. 7 and 9).

The same results as `moeca_fx.policies.branch.decide`. The k x k comparisons of a token stay in registers; k is padded
to a power of two, and padding neither matches nor takes a rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_fx.kernels.triton_gpu._common import blocks, contiguous, power_of_two
from moeca_fx.policies.branch import ScoreWeight

_PAIRS = 2048  # (branch, slot) pairs that one program holds


def decide(
    expert: Tensor,
    weight: Tensor,
    cached_expert: Tensor,
    cached_weight: Tensor,
    cached_norm: Tensor,
    threshold: Tensor,
    lambda1: float,
    lambda2: float,
    kind: ScoreWeight,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decide which branches are recomputed.

    A matched branch is recomputed when ``w + lambda1 |w - w0| + lambda2 o > threshold[expert]``; an unmatched one
    always. Scores are fp32 and may differ from the reference's in the last bit.

    Args:
        expert, weight: [B, T, k] the current routing in branch order; int64 and any float of at most 32 bits.
        cached_expert, cached_weight, cached_norm: [B, T, k] the slots.
        threshold: [B, E] per-expert threshold.
        lambda1, lambda2: weights of drift and of the norm's share o.
        kind: "share" scores a branch's share of its token's routing weight, "raw" the weight itself.

    Returns:
        slot [B, T, k] int64 (branch order -> slot); in slot order, each [B, T, k]: expert int64, score weight fp32,
        and code int8: 0 reused, 1 matched and recomputed, 2 unmatched and recomputed.
    """
    _, tokens, top_k = expert.shape
    slot, slot_expert = (torch.empty(expert.shape, dtype=expert.dtype, device=expert.device) for _ in range(2))
    slot_weight = torch.empty(expert.shape, dtype=torch.float32, device=expert.device)
    code = torch.empty(expert.shape, dtype=torch.int8, device=expert.device)
    count = expert.numel() // top_k
    if count == 0:
        return slot, slot_expert, slot_weight, code
    padded = power_of_two(top_k)
    block = max(1, min(_PAIRS // padded**2, 128))
    _decide[(blocks(count, block),)](
        *contiguous(expert, weight, cached_expert, cached_weight, cached_norm, threshold),
        slot,
        slot_expert,
        slot_weight,
        code,
        count,
        tokens,
        threshold.shape[1],
        lambda1,
        lambda2,
        SHARE=kind == "share",
        K=top_k,
        KP=padded,
        BLOCK=block,
        num_warps=4,
    )
    return slot, slot_expert, slot_weight, code


@triton.jit
def _share(value, total):
    """Value over the token's total, 0 where that is 0; rounded as torch rounds."""
    total = total[:, None] + tl.zeros_like(value)
    return tl.where(total == 0, 0.0, tl.math.div_rn(value, tl.where(total == 0, 1.0, total)))


@triton.jit
def _decide(
    expert_ptr,
    weight_ptr,
    cached_expert_ptr,
    cached_weight_ptr,
    cached_norm_ptr,
    threshold_ptr,
    slot_ptr,
    slot_expert_ptr,
    slot_weight_ptr,
    code_ptr,
    count,
    tokens,
    num_experts,
    lambda1,
    lambda2,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, KP)
    real = (lane < K)[None, :] & (token < count)[:, None]  # [BLOCK, KP]
    at = token.to(tl.int64)[:, None] * K + lane[None, :]
    expert = tl.load(expert_ptr + at, mask=real, other=-3)  # padding equals no id: an empty slot holds -1
    weight = tl.load(weight_ptr + at, mask=real, other=0.0).to(tl.float32)
    cached = tl.load(cached_expert_ptr + at, mask=real, other=-2)
    if SHARE:
        weight = _share(weight, tl.sum(weight, axis=1))

    # Match (Eq. 7), [BLOCK, branch, slot]: the i-th unmatched branch takes the i-th free slot.
    same = (expert[:, :, None] == cached[:, None, :]).to(tl.int32)
    place = tl.zeros([BLOCK, KP, KP], tl.int32) + lane[None, None, :]
    matched = tl.max(same, axis=2) > 0
    own = tl.min(tl.where(same > 0, place, KP), axis=2)
    free = (tl.max(same, axis=1) == 0) & real
    branch_rank = tl.cumsum((~matched & real).to(tl.int32), axis=1)
    slot_rank = tl.cumsum(free.to(tl.int32), axis=1)
    offered = (branch_rank[:, :, None] == slot_rank[:, None, :]) & (free[:, None, :])
    vacant = tl.min(tl.where(offered, place, KP), axis=2)
    slot = tl.where(matched, own, vacant)
    tl.store(slot_ptr + at, slot.to(tl.int64), mask=real)

    # Slot order: each slot sums over branches, of which exactly one is its own.
    mine = (slot[:, :, None] == place) & real[:, :, None]
    slot_expert = tl.sum(tl.where(mine, expert[:, :, None], 0), axis=1)
    slot_weight = tl.sum(tl.where(mine, weight[:, :, None], 0.0), axis=1)
    slot_matched = tl.max((mine & matched[:, :, None]).to(tl.int32), axis=1) > 0
    tl.store(slot_expert_ptr + at, slot_expert, mask=real)
    tl.store(slot_weight_ptr + at, slot_weight, mask=real)

    # Score (Eq. 9) against the threshold of the slot's expert.
    then = tl.load(cached_weight_ptr + at, mask=real, other=0.0).to(tl.float32)
    norm = tl.load(cached_norm_ptr + at, mask=real, other=0.0).to(tl.float32)
    score = slot_weight + lambda1 * tl.abs(slot_weight - then) + lambda2 * _share(norm, tl.sum(norm, axis=1))
    sample = (token // tokens).to(tl.int64)
    limit = tl.load(threshold_ptr + sample[:, None] * num_experts + slot_expert, mask=real, other=0.0).to(tl.float32)
    code = tl.where(slot_matched, (score > limit).to(tl.int32), 2)
    tl.store(code_ptr + at, code.to(tl.int8), mask=real)
