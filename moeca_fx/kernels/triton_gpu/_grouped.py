"""What programs of a grouped GEMM share: which tile is theirs, how it is read, where its rows go; the activations."""

import triton
import triton.language as tl


@triton.jit
def groups(offsets_ptr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """First row, end row and number of row tiles of each expert, and the running number of tiles; each [EP]."""
    e = tl.arange(0, EP)
    ends = tl.load(offsets_ptr + e, mask=e < E, other=0)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (ends - starts + BM - 1) // BM, 0)
    return starts, ends, tiles, tl.cumsum(tiles, axis=0)


@triton.jit
def find(tile, starts, ends, tiles, tile_ends, EP: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end row of a row tile."""
    expert = tl.sum((tile_ends <= tile).to(tl.int32), axis=0)
    mine = tl.arange(0, EP) == expert
    before = tl.sum(tl.where(mine, tile_ends - tiles, 0), axis=0)
    first = tl.sum(tl.where(mine, starts, 0), axis=0) + (tile - before) * BM
    return expert, first, tl.sum(tl.where(mine, ends, 0), axis=0)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return value * tl.sigmoid(value)
    elif ACTIVATION == "gelu":
        return 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # tanh(u) = 2 sigmoid(2u) - 1
        return value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(value, 0.0)


@triton.jit
def target(order_ptr, row_ptr, rows, live, TOP_K: tl.constexpr):
    """Row of the feature cache that each grouped row is written to."""
    branch = tl.load(order_ptr + rows, mask=live, other=0)
    if row_ptr is not None:
        token = tl.load(row_ptr + branch // TOP_K, mask=live, other=0)
        branch = token.to(tl.int64) * TOP_K + branch % TOP_K
    return branch


@triton.jit
def load_rows(at, left, EVEN: tl.constexpr, BK: tl.constexpr):
    """A [rows, BK] tile of which `left` columns are there, zeros for the others."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=tl.arange(0, BK)[None, :] < left, other=0.0)


@triton.jit
def load_columns(at, left, EVEN: tl.constexpr, BK: tl.constexpr):
    """A [BK, columns] tile of which `left` rows are there, zeros for the others."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=tl.arange(0, BK)[:, None] < left, other=0.0)
