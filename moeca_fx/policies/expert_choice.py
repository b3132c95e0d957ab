"""MoECa's decisions under expert choice, as pure tensor functions: the rules of `branch.py` for slots [B, E, C].

An expert owns C slots, each holds a token. Branch c of expert e now matches the slot of the *same expert* that holds
the same token. Score and share stay what they are for a token: of all branches that the token has, whichever experts
chose it. Everything is O(E*T) in memory: slots are looked up in a table by token, never compared pairwise.
"""

import math

import torch
from torch import Tensor

from moeca_fx.policies.branch import ScoreWeight, score_of, to_slots


def match_tokens(token: Tensor, cached: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Match current branches with cached slots of the same expert by token (Eq. 7).

    Args:
        token: [B, E, C] token of each branch now, distinct in a row.
        cached: [B, E, C] token held by each slot, distinct in a row; -1 before the first full step.
        tokens: T.

    Returns:
        slot [B, E, C] that the branch occupies after the update: its own when matched, else the i-th slot whose token
        left for the i-th unmatched branch; and matched [B, E, C].
    """
    capacity = token.shape[-1]
    place = torch.arange(capacity, device=token.device).expand_as(token)
    cached = _columns(cached, tokens)
    table = torch.full((*token.shape[:2], tokens + 1), -1, dtype=torch.int64, device=token.device)  # [B, E, T + 1]
    own = table.scatter(2, cached, place).gather(2, token)
    matched = own >= 0
    wanted = torch.zeros(table.shape, dtype=torch.bool, device=token.device).scatter(2, token, True)
    free = ~wanted.gather(2, cached)  # [B, E, C slot]
    # The i-th free slot at position i; those that stay go to one entry behind.
    target = torch.where(free, free.to(torch.int64).cumsum(-1) - 1, capacity)
    offered = torch.zeros(*token.shape[:2], capacity + 1, dtype=torch.int64, device=token.device)
    offered = offered.scatter(2, target, place)
    rank = (~matched).to(torch.int64).cumsum(-1) - 1
    return torch.where(matched, own, offered.gather(2, rank.clamp(min=0))), matched


def _columns(token: Tensor, tokens: int) -> Tensor:
    """Columns of a table [.., T + 1] in which each slot is entered; the last is of no token, and nobody looks it up."""
    return torch.where(token < 0, tokens, token)


def token_share(value: Tensor, token: Tensor, tokens: int) -> Tensor:
    """Each branch's share of its token's total over all experts, [B, E, C] in at least fp32; 0 where that is 0."""
    value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    where = _columns(token, tokens).flatten(1)
    sums = torch.zeros(token.shape[0], tokens + 1, dtype=value.dtype, device=token.device)
    total = sums.scatter_add(1, where, value.flatten(1)).gather(1, where).view_as(value)
    return torch.where(total == 0, torch.zeros_like(value), value / torch.where(total == 0, 1.0, total))


def token_score_weight(weight: Tensor, token: Tensor, tokens: int, kind: ScoreWeight) -> Tensor:
    """The routing weight as the score reads it, [B, E, C]."""
    if kind == "share":
        return token_share(weight, token, tokens)
    return weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight


def stored_token_weight(weight: Tensor, token: Tensor, tokens: int, kind: ScoreWeight) -> Tensor:
    """`token_score_weight` of weights in any flat layout, as a cache keeps it."""
    return token_score_weight(weight.reshape(token.shape), token, tokens, kind).clone()


def update_chosen(activation: Tensor, token: Tensor, beta: float) -> Tensor:
    """Exponential mean of "expert e chose token i" (Eq. 10): activation [B, E, T], token [B, E, C]."""
    step = torch.full(token.shape, 1.0 - beta, dtype=activation.dtype, device=activation.device)
    return (beta * activation).scatter_add(2, token, step)


def assign_tokens(
    token: Tensor, weight: Tensor, cached: Tensor, tokens: int, kind: ScoreWeight
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give every branch its slot.

    Returns:
        slot [B, E, C] (branch order -> slot); in slot order, each [B, E, C]: token, score weight, matched.
    """
    slot, matched = match_tokens(token, cached, tokens)
    weight = token_score_weight(weight, token, tokens, kind)
    return slot, to_slots(token, slot), to_slots(weight, slot), to_slots(matched, slot)


def decide_tokens(
    token: Tensor,
    weight: Tensor,
    cached_token: Tensor,
    cached_weight: Tensor,
    cached_norm: Tensor,
    threshold: Tensor,
    tokens: int,
    lambda1: float,
    lambda2: float,
    kind: ScoreWeight,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`branch.decide` for slots [B, E, C]: a matched branch is recomputed where its score exceeds the threshold.

    Args:
        token, weight: [B, E, C] the current routing in branch order.
        cached_token, cached_weight, cached_norm: [B, E, C] the slots.
        threshold: [B, E].

    Returns:
        slot, and in slot order token, score weight and code, each [B, E, C]; codes as `branch.decide`.
    """
    slot, slot_token, slot_weight, matched = assign_tokens(token, weight, cached_token, tokens, kind)
    contribution = token_share(cached_norm, cached_token, tokens)
    score = score_of(slot_weight, cached_weight, contribution, lambda1, lambda2)
    code = torch.where(matched, (score > threshold.unsqueeze(-1)).to(torch.int8), 2)
    return slot, slot_token, slot_weight, code


def decide_picked_tokens(
    token: Tensor, weight: Tensor, cached_token: Tensor, picked: Tensor, tokens: int, kind: ScoreWeight
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`decide_tokens` whose matched branches were picked before: picked [B, E, C] bool, by slot."""
    slot, slot_token, slot_weight, matched = assign_tokens(token, weight, cached_token, tokens, kind)
    return slot, slot_token, slot_weight, torch.where(matched, picked.to(torch.int8), 2)


def rank_tokens_by_score(
    token: Tensor,
    weight: Tensor,
    cached_token: Tensor,
    cached_weight: Tensor,
    cached_norm: Tensor,
    tokens: int,
    lambda1: float,
    lambda2: float,
    kind: ScoreWeight,
) -> Tensor:
    """Score (Eq. 9) of each slot, [B, E, C]; minus infinity where its expert does not choose its token any more."""
    _, _, slot_weight, matched = assign_tokens(token, weight, cached_token, tokens, kind)
    contribution = token_share(cached_norm, cached_token, tokens)
    return score_of(slot_weight, cached_weight, contribution, lambda1, lambda2).masked_fill(~matched, -math.inf)


def align_token_features(token: Tensor, before: Tensor, feature: Tensor, kept: Tensor, tokens: int) -> Tensor:
    """Earlier features in the order of new slots; a slot whose token is new takes its present feature.

    Args:
        token, before: [B, E, C] tokens of the slots now and when `kept` was written.
        feature, kept: [B, E, C, H].
    """
    slot, matched = match_tokens(token, before, tokens)
    return torch.where(matched.unsqueeze(-1), kept.gather(2, slot.unsqueeze(-1).expand_as(kept)), feature)
