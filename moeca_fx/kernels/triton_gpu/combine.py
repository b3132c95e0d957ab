"""The weighted sum of a token's cached features, each read once (Eq. 8)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_fx.kernels.triton_gpu._common import blocks, contiguous, power_of_two

_TILE = 2048  # elements of one feature tile


def combine_slots(
    feature: Tensor, weight: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``y = sum_q w_q s_q h_q`` over the slots of each token, summed in fp32.

    Args:
        feature: [.., k, H] fp32, bf16, fp16 or float8_e4m3fn, e.g. [B, T, k, H].
        weight: [.., k] routing weights in slot order, any float of at most 32 bits.
        scale: [.., k] fp32 factor of each stored feature, for features stored in 8 bits; None is 1.
        dtype: of the result; None takes that of the features, or of the weights where features have 8 bits.

    Returns:
        [.., H].
    """
    top_k, width = feature.shape[-2:]
    tokens = weight.numel() // top_k
    if dtype is None:
        dtype = weight.dtype if feature.dtype.itemsize == 1 else feature.dtype
    out = torch.empty(*feature.shape[:-2], width, dtype=dtype, device=feature.device)
    if tokens == 0:
        return out
    feature, weight = contiguous(feature, weight)
    columns = min(power_of_two(width), 512)
    rows = max(1, _TILE // columns)
    _combine[(blocks(tokens, rows), blocks(width, columns))](
        *(feature, weight, None if scale is None else scale.contiguous(), out, tokens),
        WIDTH=width,
        K=top_k,
        BM=rows,
        BN=columns,
        num_warps=4,
    )
    return out


@triton.jit
def _combine(
    feature_ptr, weight_ptr, scale_ptr, out_ptr, tokens,
    WIDTH: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    real = token < tokens
    inside = real[:, None] & (column < WIDTH)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for q in tl.static_range(K):
        weight = tl.load(weight_ptr + token * K + q, mask=real, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            weight *= tl.load(scale_ptr + token * K + q, mask=real, other=0.0)
        at = feature_ptr + (token * K + q)[:, None] * WIDTH + column[None, :]
        total += weight[:, None] * tl.load(at, mask=inside).to(tl.float32)
    at = out_ptr + token[:, None] * WIDTH + column[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)
