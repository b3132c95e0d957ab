"""Branch functions: dispatch token rows to grouped experts and combine the results.

A *branch index* is ``token * k + p`` with ``token = b * T + t``; grouped rows are branches ordered by expert.
"""

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


def plan_recomputed(code: Tensor, slot_expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group only the branches to recompute.

    Args:
        code: [B, T, k] decision in slot order, 0 is reused.
        slot_expert: [B, T, k] expert of each slot.

    Returns:
        As `plan_branches`, over the M branches with a code above 0.
    """
    chosen = torch.nonzero(code.flatten()).squeeze(1)
    order, offsets = branch_plan(slot_expert.flatten().index_select(0, chosen), num_experts)
    branch = chosen.index_select(0, order)
    return branch, slot_expert.flatten().index_select(0, branch), offsets


def gather_branches(x: Tensor, branch: Tensor, top_k: int) -> Tensor:
    """Token row of each branch: x [.., H] -> [M, H]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, branch // top_k)


def ungroup_branches(rows: Tensor, branch: Tensor) -> Tensor:
    """Grouped rows [M, H] back in branch order, every branch present once."""
    return torch.empty_like(rows).index_copy(0, branch, rows)


def combine_branches(feature: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """``y = sum_p w_p h_p`` (Eq. 8).

    Args:
        feature: [.., H] with k features a token, in the order of `weight`.
        weight: k routing weights a token.
        like: [.., H] tensor whose shape and dtype the result takes.
    """
    width = feature.shape[-1]
    tokens = like.numel() // width
    features = feature.reshape(tokens, -1, width)  # [N, k, H]
    weights = weight.reshape(tokens, 1, -1)  # [N, 1, k]
    dtype = torch.promote_types(features.dtype, weights.dtype)
    return torch.bmm(weights.to(dtype), features.to(dtype)).to(like.dtype).view(like.shape)


def feature_norm(feature: Tensor) -> Tensor:
    """L2 norm of each feature in at least fp32: [.., H] -> [..]."""
    wide = feature.float() if feature.dtype in (torch.bfloat16, torch.float16) else feature
    return torch.linalg.vector_norm(wide, dim=-1)
