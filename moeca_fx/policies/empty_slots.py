"""MoECa's decisions where slots may be empty: those of `branch.py` for expert ids of which E means none.

An empty branch matches nothing and is not decided on: its code is 0 and its weight 0. The slot that it stands in keeps
what it held, expert, weight and feature, until a new branch takes it; so an expert that comes back finds its feature.
"""

import math

import torch
from torch import Tensor

from moeca_fx.policies.branch import ScoreWeight, branch_score, place_branches, score_weight, to_slots


def match_present(expert: Tensor, cached: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`branch.match_branches` of ids [B, T, k] of which `num_experts` matches nothing, not even another one."""
    same = expert.unsqueeze(-1) == cached.unsqueeze(-2)  # [B, T, k branch, k slot]
    return place_branches(same & (expert != num_experts).unsqueeze(-1))


def update_activation(activation: Tensor, expert: Tensor, beta: float, num_experts: int) -> Tensor:
    """`branch.update_activation` [B, E, T] of the experts [B, T, k] that are there."""
    chosen = expert.transpose(1, 2)  # [B, k, T]
    step = torch.where(chosen == num_experts, 0.0, 1.0 - beta).to(activation.dtype)
    return (beta * activation).scatter_add(1, chosen.clamp(max=num_experts - 1), step)


def _assign(
    expert: Tensor, weight: Tensor, cached: Tensor, kind: ScoreWeight, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slot of each branch; in slot order expert (as it was where empty), score weight, matched, present."""
    slot, matched = match_present(expert, cached, num_experts)
    now, weight = to_slots(expert, slot), to_slots(score_weight(weight, kind), slot)
    present = now != num_experts
    return slot, torch.where(present, now, cached), weight, to_slots(matched, slot), present


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
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`branch.decide`; weights of empty branches are 0."""
    slot, held, slot_weight, matched, present = _assign(expert, weight, cached_expert, kind, num_experts)
    score = branch_score(slot_weight, cached_weight, cached_norm, lambda1, lambda2)
    limit = threshold.gather(1, held.clamp(max=num_experts - 1).flatten(1)).view_as(held)
    code = torch.where(matched, (score > limit).to(torch.int8), 2)
    return slot, held, slot_weight, torch.where(present, code, 0).to(torch.int8)


def decide_picked(
    expert: Tensor,
    weight: Tensor,
    cached_expert: Tensor,
    cached_weight: Tensor,
    picked: Tensor,
    kind: ScoreWeight,
    margin: float | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`branch.decide_picked`; a new expert always takes a slot that was never filled."""
    slot, held, slot_weight, matched, present = _assign(expert, weight, cached_expert, kind, num_experts)
    code = torch.where(present, torch.where(matched, picked.to(torch.int8), 2), 0).to(torch.int8)
    if margin is not None:
        stays = (code == 2) & (slot_weight - cached_weight <= margin) & (cached_expert != num_experts)
        held = torch.where(stays, cached_expert, held)
        code = torch.where(stays, torch.zeros_like(code), code)
    return slot, held, slot_weight, code


def rank_by_score(
    expert: Tensor,
    weight: Tensor,
    cached_expert: Tensor,
    cached_weight: Tensor,
    cached_norm: Tensor,
    lambda1: float,
    lambda2: float,
    kind: ScoreWeight,
    num_experts: int,
) -> Tensor:
    """`branch.rank_by_score`: minus infinity where the slot's expert is not routed to, or where there is none."""
    _, _, slot_weight, matched, _ = _assign(expert, weight, cached_expert, kind, num_experts)
    score = branch_score(slot_weight, cached_weight, cached_norm, lambda1, lambda2)
    return score.masked_fill(~matched, -math.inf)
