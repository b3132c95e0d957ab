"""Branch functions of expert choice: each expert runs on the C tokens of a sample that it chose.

Slots are [B, E, C]; the *branch index* of slot (b, e, c) is ``(b * E + e) * C + c``. Every expert owns equally many
slots, so grouping all of them by expert is a transposition: no sort, and sizes that are known without the device.

    source  = rows_chosen(token, T)                 [E*B*C]   row of x of each grouped row
    hidden  = experts(x[source])
    feature = ungroup_chosen(hidden, token)         [B*E*C, H]
    y       = combine_chosen(feature, token, weight, x)
"""

import torch
from torch import Tensor


def plan_chosen(token: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group all slots by expert.

    Args:
        token: [B, E, C] chosen tokens.
        tokens: T.

    Returns:
        source [E*B*C] (grouped row -> flat token row), row_expert [E*B*C], offsets [E] (end row of each expert).
    """
    batch, experts, capacity = token.shape
    first = torch.arange(batch, device=token.device).view(-1, 1, 1) * tokens
    source = (token + first).transpose(0, 1).reshape(-1)
    each = torch.arange(experts, device=token.device)
    row_expert = each.unsqueeze(1).expand(-1, batch * capacity).reshape(-1)
    return source, row_expert, (each + 1) * (batch * capacity)


def ungroup_chosen(rows: Tensor, token: Tensor) -> Tensor:
    """Grouped rows [E*B*C, H] in branch order [B*E*C, H]."""
    batch, experts, capacity = token.shape
    return rows.view(experts, batch, capacity, -1).transpose(0, 1).reshape(rows.shape)


def owners(token: Tensor) -> Tensor:
    """The expert that owns each slot, [B, E, C]."""
    return torch.arange(token.shape[1], device=token.device).view(1, -1, 1).expand(token.shape)


def source_rows(token: Tensor, branch: Tensor, tokens: int) -> Tensor:
    """Flat token row that each branch reads: slot tokens [B, E, C], branch indices [M] -> [M]."""
    own = token.shape[1] * token.shape[2]  # branches a sample
    return branch // own * tokens + token.reshape(-1).index_select(0, branch)


def combine_chosen(feature: Tensor, token: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """``y[b, t] = sum of w h over the slots that hold token t`` (Eq. 8); zero for a token that nobody chose.

    Args:
        feature: E*C features of H numbers a sample, in branch order.
        token: [B, E, C] token of each slot.
        weight: E*C routing weights a sample, in branch order.
        like: [.., H] token rows, sample by sample; the result takes their shape and dtype.
    """
    rows = like.reshape(-1, like.shape[-1])
    return _scatter_sum(feature, token, weight, rows.shape[0]).to(like.dtype).view(like.shape)


def combine_chosen_slots(feature: Tensor, token: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """`combine_chosen` from a cache: feature [B, E, C, H], token and weight [B, E, C] -> [B, T, H]."""
    batch = token.shape[0]
    total = _scatter_sum(feature, token, weight, batch * tokens)
    return total.to(feature.dtype).view(batch, tokens, feature.shape[-1])


def _scatter_sum(feature: Tensor, token: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Sum of weighted features by token row [rows, H], in the wider dtype of the two."""
    batch, width = token.shape[0], feature.shape[-1]
    dtype = torch.promote_types(feature.dtype, weight.dtype)
    first = torch.arange(batch, device=token.device).view(-1, 1, 1) * (rows // batch)
    terms = feature.reshape(-1, width).to(dtype) * weight.reshape(-1, 1).to(dtype)
    return terms.new_zeros(rows, width).index_add(0, (token + first).reshape(-1), terms)


def chosen_mask(code: Tensor, token: Tensor, tokens: int) -> Tensor:
    """Tokens with at least one recomputed branch: code and slot tokens [B, E, C] -> bool [B, T]."""
    recomputed = (code > 0).to(torch.int64).flatten(1)
    counts = torch.zeros(token.shape[0], tokens, dtype=torch.int64, device=token.device)
    return counts.scatter_add(1, token.flatten(1), recomputed) > 0
