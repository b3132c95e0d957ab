"""What token selectors rank by: attention received, age, and the part of the clock that is theirs."""

import math

import torch
from torch import Tensor


def received_attention(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """How much attention each token receives: column sums of the softmax map, averaged over heads.

    Args:
        query, key: [B, h, T, d]; h may be a multiple of the key's heads.

    Returns:
        [B, T] fp32; sums to T over the tokens.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1) if groups > 1 else key
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    attention = torch.softmax((query.float() @ key.float().transpose(-1, -2)) * factor, dim=-1)
    return attention.mean(1).sum(1)


def zero_age(output: Tensor) -> Tensor:
    """Age of tokens just computed, from any [B, T, H]: [B, T] fp32."""
    return torch.zeros(output.shape[:2], dtype=torch.float32, device=output.device)


def age_after(age: Tensor, mask: Tensor) -> Tensor:
    """Age after a step that computed the tokens in `mask` [B, T] and reused the others."""
    return torch.where(mask, torch.zeros_like(age), age + 1)


def rest_of_clock(clock: Tensor, terms: int) -> Tensor:
    """The clock without the forecast's weights."""
    return clock[terms:]
