"""Attention of selected query rows against all keys and values of their sample, with static shapes.

    out[i] = softmax(scale * query[i] @ key[b].T) @ value[b]        for the selected rows i of sample b

Selected rows are listed first, in blocks, so that a block without any ends at once. Keys and values pass once, with the
running maximum and sum of a softmax in fp32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_fx.kernels.triton_gpu._common import INTERPRETED, blocks, matmul, power_of_two


def listed_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compact a mask on the device.

    Args:
        mask: [B, T] bool.

    Returns:
        rows [B*T] int32: from b * T on, the flat rows of the selected tokens of sample b, ascending; what follows them
        is undefined; bounds [2, B] int32: where the list of each sample begins and ends.
    """
    batch, tokens = mask.shape
    rows = torch.empty(batch * tokens, dtype=torch.int32, device=mask.device)
    bounds = torch.empty(2, batch, dtype=torch.int32, device=mask.device)
    if batch:
        _list_kernel[(batch,)](mask.contiguous(), rows, bounds, batch, tokens, BLOCK=power_of_two(tokens))
    return rows, bounds


def attention_rows_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    listed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of the tokens in `mask`.

    Args:
        query: [B, T, h, d] queries of all tokens; those outside `mask` are not read.
        key, value: [B, T, h_kv, d] and [B, T, h_kv, dv]; h must be a multiple of h_kv. bf16, fp16 or fp32.
        mask: [B, T] bool.
        scale: of the logits; None is ``1 / sqrt(d)``.
        out: [B, T, h, dv] contiguous, whose selected rows are written in place; zeros when None.
        listed: `listed_rows(mask)` when it is there already.

    Returns:
        `out`.
    """
    if out is None:
        out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype, device=query.device)
    assert out.is_contiguous()
    rows, bounds = listed_rows(mask) if listed is None else listed
    _launch(query.flatten(0, 1), key, value, rows, bounds, out, scale, packed=False)
    return out


def attention_rows_packed(query: Tensor, key: Tensor, value: Tensor, row: Tensor, scale: float | None = None) -> Tensor:
    """`moeca_fx.ops.attention_rows` without waiting for the device: queries of selected rows only.

    Args:
        query: [M, h, d].
        key, value: as for `attention_rows_masked`.
        row: [M] ascending flat token index ``b * T + t`` of each query.
        scale: as above.

    Returns:
        [M, h, dv].
    """
    batch, tokens = key.shape[:2]
    edges = torch.arange(0, (batch + 1) * tokens, tokens, device=row.device, dtype=row.dtype)
    edge = torch.searchsorted(row, edges, out_int32=True)
    out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=query.device)
    _launch(query, key, value, row, torch.stack([edge[:-1], edge[1:]]), out, scale, packed=True)
    return out


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    bounds: Tensor,
    out: Tensor,
    scale: float | None,
    packed: bool,
) -> None:
    """Queries [.., h, d] and results by list place (packed) or by flat row."""
    (batch, tokens, kv_heads, depth), heads = key.shape, query.shape[1]
    if batch == 0 or query.shape[0] == 0:
        return
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    exact = query.dtype == torch.float32
    block, keys = (16, 32) if INTERPRETED else (32, 32) if exact else (64, 64)
    most = min(tokens, query.shape[0])
    _attention_kernel[(batch * heads, blocks(most, block))](
        *(query, key, value, rows, bounds, out, batch),
        (1 / math.sqrt(depth) if scale is None else scale) * math.log2(math.e),  # exponents to base 2
        *(query.stride(0), *key.stride()[:2], *value.stride()[:2]),
        # Constants, because a stride that is known to be a multiple of 8 but not of 16 still allows 16-byte loads.
        QUERY_HEAD=query.stride(1),
        KEY_HEAD=key.stride(2),
        VALUE_HEAD=value.stride(2),
        HEADS=heads,
        GROUP=heads // kv_heads,
        D=depth,
        DP=max(16, power_of_two(depth)),
        DV=value.shape[-1],
        DVP=max(16, power_of_two(value.shape[-1])),
        PACKED=packed,
        TOKENS=tokens,
        IEEE=exact,
        UPCAST=INTERPRETED,
        BM=block,
        BN=keys,
        num_warps=4,
        num_stages=2,
    )


@triton.jit
def _list_kernel(mask_ptr, rows_ptr, bounds_ptr, batch, tokens, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    token = tl.arange(0, BLOCK)
    chosen = (tl.load(mask_ptr + sample * tokens + token, mask=token < tokens, other=0) != 0).to(tl.int32)
    place = sample * tokens + tl.cumsum(chosen, axis=0) - 1
    tl.store(rows_ptr + place, sample * tokens + token, mask=chosen > 0)
    tl.store(bounds_ptr + sample, sample * tokens)
    tl.store(bounds_ptr + batch + sample, sample * tokens + tl.sum(chosen, axis=0))


@triton.jit
def _attention_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, bounds_ptr, out_ptr, batch, scale,
    query_row, key_b, key_t, value_b, value_t,
    QUERY_HEAD: tl.constexpr, KEY_HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    PACKED: tl.constexpr, TOKENS: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    place = tl.load(bounds_ptr + sample) + tl.program_id(1) * BM + tl.arange(0, BM)
    end = tl.load(bounds_ptr + batch + sample)
    if tl.load(bounds_ptr + sample) + tl.program_id(1) * BM < end:
        live = place < end
        if PACKED:
            row = place.to(tl.int64)
        else:
            row = tl.load(rows_ptr + place, mask=live, other=0).to(tl.int64)
        d = tl.arange(0, DP)
        dv = tl.arange(0, DVP)
        query_at = query_ptr + row[:, None] * query_row + head * QUERY_HEAD + d[None, :]
        query = tl.load(query_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
        key_base = key_ptr + sample.to(tl.int64) * key_b + (head // GROUP) * KEY_HEAD
        value_base = value_ptr + sample.to(tl.int64) * value_b + (head // GROUP) * VALUE_HEAD
        highest = tl.full([BM], float("-inf"), tl.float32)
        weight = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM, DVP], tl.float32)
        for start in range(0, TOKENS, BN):
            token = start + tl.arange(0, BN)
            inside = token < TOKENS
            key = tl.load(
                key_base + token[None, :] * key_t + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0
            )
            logit = matmul(query, key, tl.zeros([BM, BN], tl.float32), IEEE, UPCAST) * scale
            logit = tl.where(inside[None, :], logit, float("-inf"))
            top = tl.maximum(highest, tl.max(logit, axis=1))
            share = tl.exp2(logit - top[:, None])
            fade = tl.exp2(highest - top)
            weight = weight * fade + tl.sum(share, axis=1)
            value = tl.load(
                value_base + token[:, None] * value_t + dv[None, :],
                mask=inside[:, None] & (dv < DV)[None, :],
                other=0.0,
            )
            total = matmul(share.to(value_ptr.dtype.element_ty), value, total * fade[:, None], IEEE, UPCAST)
            highest = top
        total /= weight[:, None]
        out_at = out_ptr + (row * HEADS + head)[:, None] * DV + dv[None, :]
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dv < DV)[None, :])
