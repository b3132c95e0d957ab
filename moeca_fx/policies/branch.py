"""MoECa's decisions as pure tensor functions: match, score, threshold, slot update (method sections 2 and 3).

Each becomes one node of the cached graph; Dynamo and torch.export trace through it. Shapes: B samples, T tokens,
k branches a token, E experts. *Branch order* is the router's own order p; *slot order* q is where the cache keeps a
branch, so that a reused feature never moves in memory.
"""

import math
from typing import Literal

import torch
from torch import Tensor

ScoreWeight = Literal["share", "raw"]
EntropyNorm = Literal["minmax", "log"]

# Entropies (nats) closer than this differ by rounding only.
ALIKE_ENTROPIES = 1e-5


def match_branches(expert: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
    """Match current branches with cached slots by expert identity (Eq. 7).

    Args:
        expert: [B, T, k] expert of each branch now.
        cached: [B, T, k] expert held by each slot.

    Returns:
        slot [B, T, k], the slot that branch p occupies after the update: its own when matched, else the i-th slot
        whose expert left for the i-th unmatched branch; and matched [B, T, k].
    """
    return place_branches(expert.unsqueeze(-1) == cached.unsqueeze(-2))


def place_branches(same: Tensor) -> tuple[Tensor, Tensor]:
    """`match_branches` from what matches: same [B, T, k branch, k slot], at most once in a row and a column."""
    matched = same.any(-1)
    own_slot = same.to(torch.int64).argmax(-1)
    free = ~same.any(-2)  # [B, T, k slot]
    # The i-th unmatched branch and the i-th free slot share the rank i: compare ranks instead of sorting.
    branch_rank = (~matched).to(torch.int64).cumsum(-1)
    slot_rank = free.to(torch.int64).cumsum(-1)
    offered = (branch_rank.unsqueeze(-1) == slot_rank.unsqueeze(-2)) & free.unsqueeze(-2)
    free_slot = offered.to(torch.int64).argmax(-1)
    return torch.where(matched, own_slot, free_slot), matched


def to_slots(value: Tensor, slot: Tensor) -> Tensor:
    """Reorder [B, T, k] from branch order into slot order: ``out[..., slot[p]] = value[..., p]``."""
    return torch.zeros_like(value).scatter(-1, slot, value)


def routing_share(weight: Tensor) -> Tensor:
    """Each branch's share of its token's total routing weight, [B, T, k] in fp32; 0 where the total is 0."""
    weight = weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight
    total = weight.sum(-1, keepdim=True)
    return torch.where(total == 0, torch.zeros_like(weight), weight / torch.where(total == 0, 1.0, total))


def score_weight(weight: Tensor, kind: ScoreWeight) -> Tensor:
    """The routing weight as the score reads it, [B, T, k]."""
    if kind == "share":
        return routing_share(weight)
    return weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight


def branch_score(weight_now: Tensor, weight_then: Tensor, norm: Tensor, lambda1: float, lambda2: float) -> Tensor:
    """Recomputation score (Eq. 9): ``w + lambda1 |w - w0| + lambda2 o`` with o the branch's share of feature norms.

    Args:
        weight_now: [B, T, k] current routing weight of the branch in each slot.
        weight_then: [B, T, k] routing weight when the slot's feature was computed.
        norm: [B, T, k] L2 norm of the slot's feature.
    """
    total = norm.sum(-1, keepdim=True)
    contribution = torch.where(total == 0, torch.zeros_like(norm), norm / torch.where(total == 0, 1.0, total))
    return score_of(weight_now, weight_then, contribution, lambda1, lambda2)


def score_of(weight_now: Tensor, weight_then: Tensor, contribution: Tensor, lambda1: float, lambda2: float) -> Tensor:
    """The sum of Eq. 9 from its parts, all of one shape."""
    return weight_now + lambda1 * (weight_now - weight_then).abs() + lambda2 * contribution


def update_activation(activation: Tensor, expert: Tensor, beta: float) -> Tensor:
    """Exponential mean of "expert e was selected for token i" (Eq. 10).

    Args:
        activation: [B, E, T] so far.
        expert: [B, T, k] the experts selected now.
    """
    chosen = expert.transpose(1, 2)  # [B, k, T]
    step = torch.full(chosen.shape, 1.0 - beta, dtype=activation.dtype, device=activation.device)
    return (beta * activation).scatter_add(1, chosen, step)


def expert_threshold(activation: Tensor, tau0: float, alpha: float, entropy_norm: EntropyNorm) -> Tensor:
    """Per-expert threshold from the spatial entropy of its activation (Eq. 11 and 12), [B, E].

    An expert that was never selected has entropy 0. Where all experts are alike, up to rounding, the threshold is
    `tau0`: stretching their rounding errors to [0, 1] would make thresholds depend on the order of a sum.
    """
    total = activation.sum(-1, keepdim=True)  # [B, E, 1]
    share = activation / torch.where(total == 0, 1.0, total)
    entropy = -torch.special.xlogy(share, share).sum(-1)  # [B, E]
    if entropy_norm == "log":
        tokens = activation.shape[-1]
        scaled = entropy / math.log(tokens) if tokens > 1 else torch.full_like(entropy, 0.5)
    else:
        low, high = entropy.amin(-1, keepdim=True), entropy.amax(-1, keepdim=True)
        span = high - low
        alike = span <= ALIKE_ENTROPIES
        scaled = torch.where(alike, 0.5, (entropy - low) / torch.where(alike, 1.0, span))
    return tau0 * (1.0 + alpha * (2.0 * scaled - 1.0))


def assign(expert: Tensor, weight: Tensor, cached: Tensor, kind: ScoreWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give every branch its slot.

    Args:
        expert, weight: [B, T, k] the current routing in branch order.
        cached: [B, T, k] expert held by each slot.

    Returns:
        slot [B, T, k] (branch order -> slot); in slot order, each [B, T, k]: expert, score weight, matched.
    """
    slot, matched = match_branches(expert, cached)
    return slot, to_slots(expert, slot), to_slots(score_weight(weight, kind), slot), to_slots(matched, slot)


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
    code_dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One decision over a routing (method section 2, points 2 to 4), everything in slot order.

    Args:
        expert, weight: [B, T, k] the current routing in branch order.
        cached_expert, cached_weight, cached_norm: [B, T, k] the slots.
        threshold: [B, E] per-expert threshold.

    Returns:
        slot [B, T, k] (branch order -> slot), the expert and the score weight that each slot now holds [B, T, k],
        and code [B, T, k] in `code_dtype`: 0 reused, 1 matched and recomputed, 2 unmatched and recomputed.
    """
    slot, slot_expert, slot_weight, slot_matched = assign(expert, weight, cached_expert, kind)
    score = branch_score(slot_weight, cached_weight, cached_norm, lambda1, lambda2)
    limit = threshold.gather(1, slot_expert.flatten(1)).view_as(slot_expert)
    code = torch.where(slot_matched, (score > limit).to(code_dtype), 2)
    return slot, slot_expert, slot_weight, code


def decide_picked(
    expert: Tensor,
    weight: Tensor,
    cached_expert: Tensor,
    cached_weight: Tensor,
    picked: Tensor,
    kind: ScoreWeight,
    margin: float | None,
    code_dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A decision whose matched branches were picked before.

    Args:
        picked: [B, T, k] bool, slots to recompute where they match.
        margin: a new expert takes a slot only when its score weight exceeds the one the slot was computed with by more
            than this; else the slot stays and its feature serves the new branch. None: it always takes it.

    Returns:
        As `decide`.
    """
    slot, slot_expert, slot_weight, slot_matched = assign(expert, weight, cached_expert, kind)
    code = torch.where(slot_matched, picked.to(code_dtype), 2)
    if margin is not None:
        stays = ~slot_matched & (slot_weight - cached_weight <= margin)
        slot_expert = torch.where(stays, cached_expert, slot_expert)
        code = torch.where(stays, torch.zeros_like(code), code)
    return slot, slot_expert, slot_weight, code


def rank_by_score(
    expert: Tensor,
    weight: Tensor,
    cached_expert: Tensor,
    cached_weight: Tensor,
    cached_norm: Tensor,
    lambda1: float,
    lambda2: float,
    kind: ScoreWeight,
) -> Tensor:
    """Score (Eq. 9) of each slot, [B, T, k]; minus infinity where the slot's expert is not routed to any more."""
    _, _, slot_weight, slot_matched = assign(expert, weight, cached_expert, kind)
    score = branch_score(slot_weight, cached_weight, cached_norm, lambda1, lambda2)
    return score.masked_fill(~slot_matched, -math.inf)


def pick_share(rank: Tensor, share: float) -> Tensor:
    """The `share` of each sample's slots with the highest rank, first come first among equals: [B, T, k] -> bool."""
    flat = rank.flatten(1)
    count = round(share * flat.shape[1])
    chosen = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True)
    return (mask & (flat > -math.inf)).view_as(rank)


def pick_none(expert: Tensor) -> Tensor:
    """No slot, whatever it holds: [B, T, k] -> bool."""
    return torch.zeros_like(expert, dtype=torch.bool)
