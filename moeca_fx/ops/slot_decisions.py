"""`policies.branch.decide` for graphs of many small operations: what readers need of it and no more.

    slot, slot_expert, slot_weight, code = decide(expert, weight, held, then, norm, ...)
    by_slot = to_slots(weight, slot)
-->
    by_slot, slot_expert, slot_weight, code = decide_slots(expert, weight, held, then, part_of_norms(norm), ...)

A decision that only says which tokens are refreshed pairs nothing: every branch of the other tokens has matched.
"""

import torch
from torch import Tensor

from moeca_fx.ops.slots import RECOMPUTED, REUSED, UNMATCHED
from moeca_fx.policies.branch import ScoreWeight, match_branches, score_weight, to_slots


def part_of_norms(norm: Tensor, lambda2: float) -> Tensor:
    """The last term of the score (Eq. 9), ``lambda2 * o``: norm [.., k] -> [.., k]."""
    total = norm.sum(-1, keepdim=True)
    return lambda2 * torch.where(total == 0, torch.zeros_like(norm), norm / torch.where(total == 0, 1.0, total))


def refreshed_tokens(
    expert: Tensor,
    weight: Tensor,
    cached_expert: Tensor,
    cached_weight: Tensor,
    part: Tensor,
    threshold: Tensor,
    lambda1: float,
    kind: ScoreWeight,
) -> tuple[Tensor, Tensor]:
    """Tokens of which `decide` recomputes a branch, and the weights of the others in slot order.

    Args:
        part: [B, T, k] from `part_of_norms`.

    Returns:
        mask [B, T] bool; weight [B, T, k] by slot, of any value where the slot's expert is not routed to any more.
        Where the mask is false all branches have matched, so that their slots hold the experts that they held.
    """
    same = expert.unsqueeze(-1) == cached_expert.unsqueeze(-2)  # [B, T, k branch, k slot]
    matched = same.any(-2)
    by_slot, read_by_slot = (_of_same(same, part) for part in (weight, score_weight(weight, kind)))
    score = read_by_slot + lambda1 * (read_by_slot - cached_weight).abs() + part
    held = cached_expert.clamp(min=0)  # an empty slot matches nothing
    limit = threshold.gather(1, held.flatten(1)).view_as(held)
    return (~matched | (score > limit)).any(-1), by_slot


def _of_same(same: Tensor, value: Tensor) -> Tensor:
    """Values [B, T, k] of branches in the slots of the same experts; 0 where there is none."""
    return torch.where(same, value.unsqueeze(-1), torch.zeros_like(value).unsqueeze(-1)).sum(-2)


def decide_slots(
    expert: Tensor,
    weight: Tensor,
    cached_expert: Tensor,
    cached_weight: Tensor,
    part: Tensor,
    threshold: Tensor,
    lambda1: float,
    kind: ScoreWeight,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`policies.branch.decide` with `part` [B, T, k] from `part_of_norms`, and weights in place of places.

    Returns:
        routing weight, expert and score weight that each slot now holds, and the code in int64, all [B, T, k].
    """
    slot, matched = match_branches(expert, cached_expert)
    slot_expert = to_slots(expert, slot)
    slot_weight = to_slots(score_weight(weight, kind), slot)
    score = slot_weight + lambda1 * (slot_weight - cached_weight).abs() + part
    limit = threshold.gather(1, slot_expert.flatten(1)).view_as(slot_expert)
    code = torch.where(to_slots(matched, slot), torch.where(score > limit, RECOMPUTED, REUSED), UNMATCHED)
    return to_slots(weight, slot), slot_expert, slot_weight, code


def forced_tokens(mask: Tensor, force: Tensor) -> Tensor:
    """A mask [B, T] where `force` [] bool refreshes every token."""
    return mask | force
