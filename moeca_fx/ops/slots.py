"""Slot functions: values of k branches a token in the cache's layout [B, T, k], and what is counted over them."""

import torch
from torch import Tensor

from moeca_fx.policies.branch import ScoreWeight, score_weight

REUSED = 0
RECOMPUTED = 1
UNMATCHED = 2


def slots(value: Tensor, tokens: int, top_k: int) -> Tensor:
    """Branch values, k a token in any flat layout -> [B, T, k]."""
    return value.reshape(-1, tokens, top_k)


def slot_features(feature: Tensor, tokens: int, top_k: int) -> Tensor:
    """Branch features [B*T*k, H] -> [B, T, k, H]."""
    return feature.reshape(-1, tokens, top_k, feature.shape[-1])


def stored_weight(weight: Tensor, tokens: int, top_k: int, kind: ScoreWeight) -> Tensor:
    """Routing weights as the score reads them, [B, T, k] and at least fp32."""
    return score_weight(weight.reshape(-1, tokens, top_k), kind).clone()


def token_mask(code: Tensor) -> Tensor:
    """Tokens with at least one recomputed branch: code [.., k] -> bool [..]."""
    return code.amax(-1) > REUSED


def forced_code(code: Tensor, force: Tensor) -> Tensor:
    """A decision where `force` [] bool recomputes every branch: code [.., k] -> [.., k]."""
    return torch.where(force & (code == REUSED), RECOMPUTED, code).to(code.dtype)


def forced_tokens(cache: Tensor, force: Tensor) -> Tensor:
    """All tokens if `force` [] bool, else none: cache [B, T, ..] -> bool [B, T]."""
    return force.expand(cache.shape[:2])


def refreshed_weight(code: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Slot weights after the step: `now` where the slot is recomputed, else `then`, all [.., k]."""
    return torch.where(code > REUSED, now, then)


def count_recomputed(code: Tensor) -> Tensor:
    """How many branches are recomputed, [] int64."""
    return (code > REUSED).sum(dtype=torch.int64)


def count_matched(code: Tensor, all_codes_like: Tensor) -> Tensor:
    """How many branches matched, [] int64; branches of `all_codes_like` that have no code here all matched."""
    unmatched = (code == UNMATCHED).sum(dtype=torch.int64)
    return all_codes_like.numel() - unmatched


def count_rows(row: Tensor) -> Tensor:
    """How many rows were selected, [] int64."""
    return torch.ones_like(row).sum()


def count_branches(row: Tensor, top_k: int) -> Tensor:
    """How many branches the selected rows have, [] int64."""
    return torch.ones_like(row).sum() * top_k


def count_padded(mask: Tensor) -> Tensor:
    """Query rows that padded row attention executes for a refresh mask [B, T], [] int64."""
    return mask.sum(1).amax(0) * mask.shape[0]


def unmatched_rows(code: Tensor, local: Tensor, picked: Tensor, top_k: int) -> Tensor:
    """Which computed branches are new: code [.., k], local and picked [M] from `plan_recomputed` -> [M] bool."""
    return code.reshape(-1, top_k)[local, picked % top_k] == UNMATCHED
