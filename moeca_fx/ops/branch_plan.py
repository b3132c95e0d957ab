"""Group branches by expert, so that each expert multiplies one contiguous slice of rows."""

import torch
from torch import Tensor


def branch_plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable grouping of branches by expert.

    Args:
        expert_ids: [M] expert of each branch, in ``[0, num_experts)``.
        num_experts: E.

    Returns:
        order [M]: branch index of each grouped row; offsets [E]: the end row of each expert's slice.
    """
    grouped, order = torch.sort(expert_ids, stable=True)
    edges = torch.arange(num_experts, device=expert_ids.device, dtype=expert_ids.dtype)
    return order, torch.searchsorted(grouped, edges, right=True)
