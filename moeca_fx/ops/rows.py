"""Row functions: take the rows of selected tokens out of dense tensors and write results back into caches.

A *row* is a flat token index ``b * T + t``. Row tensors keep the rank of their dense tensor: the sample axis runs over
the selected rows and the token axis has size 1, so that every token-wise operation applies unchanged.
"""

import torch
from torch import Tensor


def select_rows(mask: Tensor) -> Tensor:
    """Flat indices of the set entries, ascending: [B, T] or [B, T, k] bool -> [M] int64."""
    return torch.nonzero(mask.flatten()).squeeze(1)


def gather_rows(x: Tensor, row: Tensor, batch_axis: int, token_axis: int) -> Tensor:
    """Rows of a dense tensor; with equal axes they are already merged into one.

    [.., B, .., T, ..] -> [.., M, .., 1, ..], or [.., B*T, ..] -> [.., M, ..].
    """
    if batch_axis == token_axis:
        return x.index_select(batch_axis, row)
    flat = _in_front(x, batch_axis, token_axis).flatten(0, 1).index_select(0, row)
    return tokens_back(flat.unsqueeze(1), batch_axis, token_axis)


def rows_of_rows(row: Tensor, chosen: Tensor) -> Tensor:
    """Flat token rows of some entries of a row list: row [M], chosen [L] -> [L]."""
    return row.index_select(0, chosen)


def gather_samples(x: Tensor, row: Tensor, tokens: int, batch_axis: int) -> Tensor:
    """One entry of a per-sample tensor for each row: [.., B, ..] -> [.., M, ..]."""
    return x.index_select(batch_axis, row // tokens)


def gather_tokens(x: Tensor, row: Tensor, tokens: int, batch_axis: int, token_axis: int) -> Tensor:
    """One entry of a per-token table for each row: [.., 1, .., T, ..] -> [.., M, .., 1, ..]."""
    return x.index_select(token_axis, row % tokens).transpose(batch_axis, token_axis)


def pad_rank(x: Tensor, rank: int) -> Tensor:
    """Prepend axes of size 1 until `x` has `rank` axes."""
    return x.reshape((1,) * (rank - x.dim()) + tuple(x.shape))


def rows_first(x: Tensor, batch_axis: int, token_axis: int) -> Tensor:
    """Row tensor [.., M, .., 1, ..] -> [M, rest]."""
    if batch_axis == token_axis:
        return x.movedim(batch_axis, 0)
    return _in_front(x, batch_axis, token_axis).squeeze(1)


def tokens_first(x: Tensor, batch_axis: int, token_axis: int, tokens: int) -> Tensor:
    """Dense tensor -> contiguous [B, T, rest], the layout of every cache."""
    if batch_axis == token_axis:
        merged = x.movedim(batch_axis, 0)
        return merged.reshape(-1, tokens, *merged.shape[1:]).contiguous()
    return _in_front(x, batch_axis, token_axis).contiguous()


def _in_front(x: Tensor, batch_axis: int, token_axis: int) -> Tensor:
    """[.., B, .., T, ..] -> [B, T, rest]; most tensors are laid out so already."""
    return x if (batch_axis, token_axis) == (0, 1) else x.movedim((batch_axis, token_axis), (0, 1))


def tokens_back(cache: Tensor, batch_axis: int, token_axis: int) -> Tensor:
    """Inverse of `tokens_first`: cache [B, T, rest] -> the dense tensor's own layout."""
    if batch_axis == token_axis:
        return cache.flatten(0, 1).movedim(0, batch_axis)
    return cache if (batch_axis, token_axis) == (0, 1) else cache.movedim((0, 1), (batch_axis, token_axis))


def empty_rows(like: Tensor, values: Tensor) -> Tensor:
    """Zeros for every token of `like` [B, T, ..] in the shape of `values` [M, rest]: [B, T, rest]."""
    return values.new_zeros(*like.shape[:2], *values.shape[1:])


def write_rows(cache: Tensor, row: Tensor, values: Tensor) -> Tensor:
    """Cache [.., rest] with the given flat rows replaced by `values` [M, rest]."""
    flat = cache.view(-1, *values.shape[1:])
    return flat.index_copy(0, row, values.to(cache.dtype)).view(cache.shape)


def write_rows_(cache: Tensor, row: Tensor, values: Tensor) -> Tensor:
    """`write_rows` in place: only the given rows are written."""
    cache.view(-1, *values.shape[1:]).index_copy_(0, row, values.to(cache.dtype))
    return cache
