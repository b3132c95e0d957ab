"""Branch functions where slots may be empty: an expert id of E stands for no expert.

Thresholds, capacities and experts that compute nothing leave slots of a token without an expert. Such slots are never
gathered, computed or counted; their features are zero, and so are their weights.

    code    = present_code(expert, E, k)                    [N, k]  1 where a slot has an expert
    branch, local, row_expert, offsets = plan_recomputed(code, expert)
    feature = spread(experts(x[local]), branch, code)       [N*k, H]
"""

import torch
from torch import Tensor

from moeca_fx.ops.slots import RECOMPUTED, UNMATCHED


def present_code(expert: Tensor, num_experts: int, top_k: int) -> Tensor:
    """A decision that computes every slot with an expert: ids in any layout, k a token -> int8 [N, k]."""
    return (expert.reshape(-1, top_k) != num_experts).to(torch.int8) * RECOMPUTED


def spread(rows: Tensor, branch: Tensor, code: Tensor) -> Tensor:
    """Rows [M, H] at their distinct branch indices [M], zero elsewhere: code [N, k] -> [N*k, H]."""
    return rows.new_zeros(code.numel(), rows.shape[-1]).index_copy(0, branch, rows)


def count_present(expert: Tensor, num_experts: int) -> Tensor:
    """How many slots have an expert, [] int64."""
    return (expert != num_experts).sum(dtype=torch.int64)


def count_matched_present(code: Tensor, expert: Tensor, num_experts: int) -> Tensor:
    """How many branches matched, [] int64; branches of `expert` [B, T, k] that have no code here all matched."""
    return count_present(expert, num_experts) - (code == UNMATCHED).sum(dtype=torch.int64)
