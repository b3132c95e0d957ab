"""Branch functions: dispatch token rows to grouped experts and combine the results.

A *branch index* is ``token * k + p`` with ``token = b * T + t``; grouped rows are branches ordered by expert.
"""

import functools

import torch
from torch import Tensor

from moeca_fx.ops.branch_plan import branch_plan


def plan_branches(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group all branches by expert.

    Args:
        expert: expert ids of all branches, any shape with M elements in branch order.

    Returns:
        branch [M] (grouped row -> branch index), row_expert [M], offsets [E] (end row of each expert).
    """
    ids = expert.reshape(-1)
    branch, offsets = branch_plan(ids, num_experts)
    return branch, ids.index_select(0, branch), offsets


def plan_recomputed(
    code: Tensor, slot_expert: Tensor, row: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group only the branches to recompute.

    Args:
        code: [.., k] decision in slot order, 0 is reused.
        slot_expert: [.., k] expert of each slot.
        row: token row that each leading entry stands for; None when they are all tokens in order.

    Returns:
        branch [M] (grouped row -> branch index in the cache), local [M] (grouped row -> leading entry of `code`),
        row_expert [M], offsets [E], over the M branches with a code above 0.
    """
    top_k = code.shape[-1]
    chosen = torch.nonzero(code.flatten()).squeeze(1)
    ids = slot_expert.flatten().index_select(0, chosen)
    order, offsets = branch_plan(ids, num_experts)
    picked = chosen.index_select(0, order)
    local = picked // top_k
    branch = picked if row is None else row.index_select(0, local) * top_k + picked % top_k
    return branch, local, ids.index_select(0, order), offsets


def gather_branches(x: Tensor, branch: Tensor, top_k: int) -> Tensor:
    """Token row of each branch: x [.., H] -> [M, H]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, branch // top_k)


def take_rows(x: Tensor, local: Tensor) -> Tensor:
    """Rows [M, H] of token rows x [.., H]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, local)


def ungroup_branches(rows: Tensor, branch: Tensor) -> Tensor:
    """Grouped rows [M, H] back in branch order, every branch present once."""
    grouped_row = torch.arange(branch.shape[0], device=branch.device)
    return rows.index_select(0, torch.zeros_like(branch).scatter(0, branch, grouped_row))


def combine_branches(feature: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """``y = sum_p w_p h_p`` (Eq. 8).

    Args:
        feature: [.., H] with k features a token, in the order of `weight`.
        weight: k routing weights a token.
        like: [.., H] tensor whose shape and dtype the result takes.
    """
    tokens = like.numel() // like.shape[-1]
    rows = feature.reshape(tokens, -1, feature.shape[-1])
    return _weighted_sum(rows, weight.reshape(tokens, -1), like.dtype).view(like.shape)


def combine_rows(feature: Tensor, weight: Tensor, top_k: int) -> Tensor:
    """`combine_branches` for any number of token rows, none too: feature [M*k, H], weight [M, k] -> [M, H]."""
    return _weighted_sum(feature.reshape(-1, top_k, feature.shape[-1]), weight.reshape(-1, top_k), feature.dtype)


def combine_slots(feature: Tensor, weight: Tensor) -> Tensor:
    """``y = sum_q w_q h_q`` over slots: feature [B, T, k, H] and weight [B, T, k] -> [B, T, H]."""
    batch, tokens, _, width = feature.shape
    return _weighted_sum(feature.flatten(0, 1), weight.flatten(0, 1), feature.dtype).view(batch, tokens, width)


def _weighted_sum(feature: Tensor, weight: Tensor, result: torch.dtype) -> Tensor:
    """[N, k, H] and [N, k] -> [N, H], summed in the wider of their dtypes."""
    dtype = torch.promote_types(feature.dtype, weight.dtype)
    if torch.compiler.is_compiling():  # k terms that fuse with what follows: every feature is read once
        terms = [weight[:, p, None].to(dtype) * feature[:, p].to(dtype) for p in range(feature.shape[1])]
        return functools.reduce(torch.add, terms).to(result)
    return torch.bmm(weight.unsqueeze(1).to(dtype), feature.to(dtype)).squeeze(1).to(result)


def feature_norm(feature: Tensor) -> Tensor:
    """L2 norm of each feature in at least fp32: [.., H] -> [..]."""
    wide = feature.float() if feature.dtype in (torch.bfloat16, torch.float16) else feature
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1)
    return norm
