"""Forecasts in the graph: weighted sums of values of the last full steps, and corrections of what was computed since.

The weights are the first entries of the step's *clock*, a small fp32 tensor that the host fills in.
"""

import functools

import torch
from torch import Tensor

from moeca_fx.policies.branch import match_branches


def forecast(clock: Tensor, *values: Tensor) -> Tensor:
    """``sum_i clock[i] values[i]``, all of one shape, in at least fp32, then in their dtype."""
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = clock[0].to(wide) * values[0].to(wide)
    for index, value in enumerate(values[1:], start=1):
        total = total + clock[index].to(wide) * value.to(wide)
    return total.to(values[0].dtype)


def widen(value: Tensor, channels: int) -> Tensor:
    """[B, C, ...] with zero channels appended until there are `channels`."""
    missing = channels - value.shape[1]
    if missing == 0:
        return value
    return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], 1)


def forecast_rows(clock: Tensor, row: Tensor, *values: Tensor) -> Tensor:
    """`forecast` of some rows of [B, T, k, H] values: flat branch indices row [M] -> [M, H]."""
    return forecast(clock, *(value.flatten(0, -2).index_select(0, row) for value in values))


def add_rows(cache: Tensor, row: Tensor, change: Tensor) -> Tensor:
    """Cache [.., rest] with `change` [M, rest] added to the given flat rows."""
    flat = cache.view(-1, *change.shape[1:])
    return flat.index_add(0, row, change.to(cache.dtype)).view(cache.shape)


def add_rows_(cache: Tensor, row: Tensor, change: Tensor) -> Tensor:
    """`add_rows` in place."""
    cache.view(-1, *change.shape[1:]).index_add_(0, row, change.to(cache.dtype))
    return cache


def missed(fresh: Tensor, dense: Tensor, row: Tensor) -> Tensor:
    """What a forecast missed: rows computed anew [M, rest] minus the same rows of the forecast `dense` [.., rest].

    Added to every kept value of a row it corrects the level and leaves the trend: forecasts have weights of sum 1.
    """
    return fresh - dense.reshape(-1, *fresh.shape[1:]).index_select(0, row).to(fresh.dtype)


def corrected_rows(rows: Tensor, change: Tensor) -> Tensor:
    """`add_rows` on the rows themselves, [M, rest]."""
    return rows + change.to(rows.dtype)


def restarted_rows(rows: Tensor, change: Tensor, values: Tensor, restart: Tensor) -> Tensor:
    """`restart_rows` on the rows themselves, [M, rest]."""
    mask = restart.view(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values.to(rows.dtype), rows + change.to(rows.dtype))


def restart_rows(cache: Tensor, row: Tensor, change: Tensor, values: Tensor, restart: Tensor) -> Tensor:
    """`add_rows`, but rows with `restart` [M] take `values` [M, rest] instead: they have no history."""
    flat = cache.view(-1, *values.shape[1:])
    corrected = restarted_rows(flat.index_select(0, row), change, values, restart)
    return flat.index_copy(0, row, corrected).view(cache.shape)


def restart_rows_(cache: Tensor, row: Tensor, change: Tensor, values: Tensor, restart: Tensor) -> Tensor:
    """`restart_rows` in place."""
    flat = cache.view(-1, *values.shape[1:])
    corrected = restarted_rows(flat.index_select(0, row), change, values, restart)
    flat.index_copy_(0, row, corrected)
    return cache


def combine_history(clock: Tensor, weight: Tensor, *features: Tensor) -> Tensor:
    """``y = sum_q w_q sum_i clock[i] h_i,q``: weight [B, T, k], kept features each [B, T, k, H] -> [B, T, H]."""
    wide = torch.promote_types(features[0].dtype, torch.float32)
    if torch.compiler.is_compiling():  # terms that fuse with what follows: every kept feature is read once
        terms = [
            (weight[..., slot, None].to(wide) * clock[index].to(wide)) * feature[..., slot, :].to(wide)
            for index, feature in enumerate(features)
            for slot in range(weight.shape[-1])
        ]
        return functools.reduce(torch.add, terms).to(features[0].dtype)
    rows = weight.flatten(0, 1).unsqueeze(1).to(wide)  # [B*T, 1, k]
    total = torch.bmm(rows * clock[0].to(wide), features[0].flatten(0, 1).to(wide))
    for index, feature in enumerate(features[1:], start=1):
        total = torch.baddbmm(total, rows * clock[index].to(wide), feature.flatten(0, 1).to(wide))
    batch, tokens, _, width = features[0].shape
    return total.view(batch, tokens, width).to(features[0].dtype)


def align_features(expert: Tensor, before: Tensor, feature: Tensor, kept: Tensor) -> Tensor:
    """Earlier features in the order of new slots; a slot whose expert is new takes its present feature.

    Args:
        expert, before: [B, T, k] experts of the slots now and when `kept` was written.
        feature, kept: [B, T, k, H].
    """
    # Branch p of the new slots finds its own old slot, or a free one.
    slot, matched = match_branches(expert, before)
    index = slot.unsqueeze(-1).expand_as(kept)
    return torch.where(matched.unsqueeze(-1), kept.gather(2, index), feature)


def forecast_error(clock: Tensor, truth: Tensor, *values: Tensor) -> Tensor:
    """``||truth - forecast(values)||`` over the last axis, in fp32: values [.., H] -> [..]."""
    error: Tensor = torch.linalg.vector_norm((truth - forecast(clock, *values)).float(), dim=-1)
    return error
