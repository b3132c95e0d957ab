"""Storage functions: vectors of a cache in fewer bits, written and read whole or by rows.

A vector is the last axis. Its codes in fp8 (e4m3) share one fp32 scale, the largest magnitude over 448; codes in
bfloat16 have none.
"""

import torch
from torch import Tensor

_LARGEST = 448.0  # of float8_e4m3fn


def encode_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [.., H] -> fp8 codes [.., H] and scales [..] fp32; a vector of zeros has scale 1."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    scale = (wide.abs().amax(-1) / _LARGEST).to(torch.float32)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (wide / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


def narrow_rows(values: Tensor) -> Tensor:
    """Values -> bfloat16 codes."""
    return values.to(torch.bfloat16)


def decode_rows(code: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes [.., H] and their scales [..] -> values [.., H] of `dtype`."""
    if scale is None:
        return code.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return code.to(wide).mul_(scale.unsqueeze(-1)).to(dtype)


def read_rows(code: Tensor, scale: Tensor | None, row: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of some vectors: flat indices row [M] into codes [.., H] -> [M, H]."""
    picked = code.flatten(0, -2).index_select(0, row)
    return decode_rows(picked, None if scale is None else scale.flatten().index_select(0, row), dtype)


def decode_written(code: Tensor, scale: Tensor, row: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """All values after rows were written in fp8; the rows themselves [M, rest] as they were before they were stored."""
    dense = decode_rows(code, scale, dtype)
    dense.view(-1, *values.shape[1:]).index_copy_(0, row, values.to(dtype))
    return dense


def write_codes(cache: Tensor, row: Tensor, code: Tensor) -> Tensor:
    """`write_rows` of fp8 codes, as the bytes they are: a CPU copies no fp8 rows."""
    flat = cache.view(torch.uint8).view(-1, *code.shape[1:])
    return flat.index_copy(0, row, code.view(torch.uint8)).view(cache.shape).view(cache.dtype)


def write_codes_(cache: Tensor, row: Tensor, code: Tensor) -> Tensor:
    """`write_codes` in place."""
    cache.view(torch.uint8).view(-1, *code.shape[1:]).index_copy_(0, row, code.view(torch.uint8))
    return cache
