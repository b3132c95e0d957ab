"""`moeca::attention_rows`: attention of a few query rows against all cached keys and values of their sample."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("moeca::attention_rows", mutates_args=())
def attention_rows(query: Tensor, key: Tensor, value: Tensor, row: Tensor, scale: float | None) -> Tensor:
    """Scaled dot-product attention of selected tokens only.

    Args:
        query: [M, h, d] queries of the selected tokens.
        key, value: [B, T, h_kv, d] all keys and values; h must be a multiple of h_kv (grouped-query attention).
        row: [M] ascending flat token index ``b * T + t`` of each query.
        scale: softmax scale; None is ``1 / sqrt(d)``.

    Returns:
        [M, h, d_v].
    """
    batch, tokens = key.shape[:2]
    if query.shape[0] == 0:
        return query.new_empty(0, query.shape[1], value.shape[-1])
    sample, position, widest = _padded_places(row, batch, tokens)
    padded = query.new_zeros(batch, widest, *query.shape[1:])
    padded[sample, position] = query
    out = functional.scaled_dot_product_attention(
        padded.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[2],
    )
    return out.transpose(1, 2)[sample, position].contiguous()  # [M, h, d_v]


@attention_rows.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, row: Tensor, scale: float | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[-1])


def _padded_places(row: Tensor, batch: int, tokens: int) -> tuple[Tensor, Tensor, int]:
    """Where each row goes in the padded [B, widest] table, and how wide the table is."""
    sample = row // tokens
    counts = torch.bincount(sample, minlength=batch)
    first = counts.cumsum(0) - counts
    position = torch.arange(row.shape[0], device=row.device) - first[sample]
    return sample, position, int(counts.max())


@register_flop_formula(torch.ops.moeca.attention_rows, get_raw=True)
def _flops(query: Tensor, key: Tensor, value: Tensor, row: Tensor, *args: Any, **kwargs: Any) -> int:
    """Padded rows are executed, so they are counted; rows unknown at trace time count as one row a query."""
    if query.shape[0] == 0:
        return 0
    from torch._subclasses.fake_tensor import FakeTensor

    batch, tokens = key.shape[:2]
    if isinstance(row, FakeTensor):
        rows = query.shape[0]
    else:
        rows = batch * _padded_places(row, batch, tokens)[2]
    heads = query.shape[1]
    return int(2 * rows * tokens * heads * (query.shape[-1] + value.shape[-1]))
