"""The expert-choice hypothesis: each expert runs on tokens that it chose, and what they get is summed by token.

y[b, t] = sum over (e, c) with token[b, e, c] == t of weight[b, e, c] * expert_e(x[b, t])
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Roles = tuple[str, str, str]
"""Names of the arguments that carry token rows, chosen tokens and routing weights."""


def candidate_roles(arguments: Mapping[str, Tensor], experts: int) -> list[Roles]:
    """Every triple (x [B, T, H] or [B*T, H], token [B, E, C], weight [B, E, C]) whose values are possible.

    Args:
        arguments: tensors that the region was called with.
        experts: E.
    """
    return [
        (x, token, weight)
        for token, ids in arguments.items()
        for x, rows in arguments.items()
        for weight, weights in arguments.items()
        if rows.is_floating_point()
        and weights.is_floating_point()
        and weight != x
        and weights.shape == ids.shape
        and _may_choose(rows, ids, experts)
    ]


def _may_choose(rows: Tensor, ids: Tensor, experts: int) -> bool:
    """Whether ids [B, E, C] can be tokens of these rows, each token once an expert."""
    if ids.dtype != torch.int64 or ids.dim() != 3 or ids.shape[1] != experts or rows.dim() not in (2, 3):
        return False
    batch = ids.shape[0]
    tokens, rest = divmod(rows.numel() // rows.shape[-1], batch)
    if rest or (rows.dim() == 3 and rows.shape[0] != batch) or not 1 <= ids.shape[2] <= tokens:
        return False
    ordered = ids.sort(-1).values
    in_range = bool((ordered[..., 0] >= 0).all() and (ordered[..., -1] < tokens).all())
    return in_range and bool((ordered.diff(dim=-1) > 0).all())
