"""Routed experts over the branches that a plan picked, in place in the feature cache: two grouped GEMMs.

    inner[r]           = act(x[token] @ gate[e].T + bg) * (x[token] @ up[e].T + bu)      rows gathered by order // k
    feature[order[r]]  = inner[r] @ down[e].T + bd                                       rows scattered by order

for every grouped row r below offsets[-1], with e the expert that owns r. The grid is persistent and static; programs
find their tiles from the offsets on the device, so nothing past the last live row costs more than a comparison.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_fx.kernels.triton_gpu._common import INTERPRETED, blocks, matmul, power_of_two
from moeca_fx.kernels.triton_gpu._grouped import activate, find, groups, load_columns, load_rows, target
from moeca_fx.kernels.triton_gpu.tiles import Tiles, can_describe, default_tiles, described, programs

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
_NORM_ROWS = 64


def gated_experts(
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    feature: Tensor,
    *,
    norm: Tensor | None = None,
    row: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation = "silu",
    tiles: Tiles | None = None,
) -> None:
    """Compute the planned branches and write them into `feature`; all other rows stay as they are.

    Args:
        x: [R, H_in] token rows; bf16, fp16 or fp32, the dtype of the weights. Sums are fp32, without TF32.
        order, offsets: [R*k] and [E] from `plan` over the [R, k] codes of these rows.
        top_k: k.
        gate: [E, I, H_in], or None for experts without a gate: ``act(x @ up.T + bu)``.
        up, down: [E, I, H_in] and [E, H, I], any strides.
        feature: [N*k, H] contiguous, written in place.
        norm: [N*k] fp32 contiguous, written in place: L2 norm of each written row as stored.
        row: [R] token of each row of `x`; None when R = N and they are all tokens in order.
        gate_bias, up_bias, down_bias: [E, I], [E, I] and [E, H] contiguous.
        activation: of the gate, or of the only projection.
        tiles: from `tuned_tiles`; by rule when None.
    """
    assert feature.is_contiguous() and (norm is None or norm.is_contiguous())
    assert x.dtype == up.dtype == down.dtype, f"one dtype expected, found {x.dtype}, {up.dtype}, {down.dtype}"
    rows, (num_experts, width, depth), out_width = order.shape[0], up.shape, down.shape[1]
    if rows == 0:
        return
    tiles = tiles or default_tiles(rows, up)
    x = x if x.stride(-1) == 1 else x.contiguous()
    inner = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    column_blocks = blocks(out_width, tiles.down.columns)
    partial = None if norm is None else torch.empty(rows, column_blocks, dtype=torch.float32, device=x.device)
    shared: dict[str, Any] = {
        "TOP_K": top_k,
        "E": num_experts,
        "EP": power_of_two(num_experts),
        "IEEE": x.dtype == torch.float32,
        "UPCAST": INTERPRETED,
    }
    first = gate if gate is not None else up
    through_tma = tiles.up.tma and can_describe(first) and can_describe(up)
    launched = programs(rows, width, num_experts, tiles.up, x.device)
    _up_kernel[(launched,)](
        *(x, order, offsets),
        *(described(weight, tiles.up) if through_tma else weight for weight in (first, up)),
        *(gate_bias, up_bias, inner),
        *(x.stride(0), *first.stride(), *up.stride()),
        WIDTH=width,
        DEPTH=depth,
        TMA=through_tma,
        GATED=gate is not None,
        ACTIVATION=activation,
        **shared,
        **tiles.up.options(),
    )
    launched = programs(rows, out_width, num_experts, tiles.down, x.device)
    through_tma = tiles.down.tma and can_describe(down)
    _down_kernel[(launched,)](
        *(inner, order, offsets, described(down, tiles.down) if through_tma else down),
        *(down_bias, row, feature, partial),
        *down.stride(),
        TMA=through_tma,
        WIDTH=out_width,
        DEPTH=width,
        **shared,
        **tiles.down.options(),
    )
    if norm is not None:
        _norm_kernel[(blocks(rows, _NORM_ROWS),)](
            *(partial, order, offsets, row, norm, column_blocks),
            TOP_K=top_k,
            E=num_experts,
            COLUMNS=power_of_two(column_blocks),
            BM=_NORM_ROWS,
        )


@triton.jit
def _up_kernel(
    x_ptr, order_ptr, offsets_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, inner_ptr,
    x_stride, gate_e, gate_n, gate_k, up_e, up_n, up_k,
    TMA: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    TOP_K: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    starts, ends, tiles, tile_ends = groups(offsets_ptr, E, EP, BM)
    column_blocks = (WIDTH + BN - 1) // BN
    total = tl.sum(tiles, axis=0) * column_blocks
    index = tl.program_id(0)
    while index < total:  # triton 3.6 cannot interpret `range` up to a value that was loaded
        expert, first, end = find(index // column_blocks, starts, ends, tiles, tile_ends, EP, BM)
        rows = first + tl.arange(0, BM)
        columns = (index % column_blocks) * BN + tl.arange(0, BN)
        # Rows and columns past the end read a valid address and are never stored, so that loads need no mask.
        token = tl.load(order_ptr + rows, mask=rows < end, other=0) // TOP_K
        column = tl.minimum(columns, WIDTH - 1).to(tl.int64)
        k = tl.arange(0, BK)
        x_at = x_ptr + token[:, None] * x_stride + k[None, :]
        first_column = expert * WIDTH + (index % column_blocks) * BN
        if not TMA:
            gate_at = gate_ptr + expert.to(tl.int64) * gate_e + column[None, :] * gate_n + k[:, None] * gate_k
            up_at = up_ptr + expert.to(tl.int64) * up_e + column[None, :] * up_n + k[:, None] * up_k
        gated = tl.zeros([BM, BN], tl.float32)
        raised = tl.zeros([BM, BN], tl.float32)
        for start in range(0, DEPTH, BK):
            a = load_rows(x_at, DEPTH - start, DEPTH % BK == 0, BK)
            if TMA:
                b = up_ptr.load([first_column, start]).T
            else:
                b = load_columns(up_at, DEPTH - start, DEPTH % BK == 0, BK)
                up_at += BK * up_k
            raised = matmul(a, b, raised, IEEE, UPCAST)
            if GATED:
                if TMA:
                    c = gate_ptr.load([first_column, start]).T
                else:
                    c = load_columns(gate_at, DEPTH - start, DEPTH % BK == 0, BK)
                    gate_at += BK * gate_k
                gated = matmul(a, c, gated, IEEE, UPCAST)
            x_at += BK
        if up_bias_ptr is not None:
            raised += tl.load(up_bias_ptr + expert * WIDTH + column)[None, :].to(tl.float32)
        if GATED:
            if gate_bias_ptr is not None:
                gated += tl.load(gate_bias_ptr + expert * WIDTH + column)[None, :].to(tl.float32)
            raised *= activate(gated, ACTIVATION)
        else:
            raised = activate(raised, ACTIVATION)
        at = inner_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        keep = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        tl.store(at, raised.to(inner_ptr.dtype.element_ty), mask=keep)
        index += tl.num_programs(0)


@triton.jit
def _down_kernel(
    inner_ptr, order_ptr, offsets_ptr, down_ptr, bias_ptr, row_ptr, feature_ptr, partial_ptr,
    down_e, down_n, down_k,
    TMA: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, TOP_K: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    starts, ends, tiles, tile_ends = groups(offsets_ptr, E, EP, BM)
    column_blocks = (WIDTH + BN - 1) // BN
    total = tl.sum(tiles, axis=0) * column_blocks
    index = tl.program_id(0)
    while index < total:  # triton 3.6 cannot interpret `range` up to a value that was loaded
        expert, first, end = find(index // column_blocks, starts, ends, tiles, tile_ends, EP, BM)
        rows = first + tl.arange(0, BM)
        live = rows < end
        columns = (index % column_blocks) * BN + tl.arange(0, BN)
        column = tl.minimum(columns, WIDTH - 1).to(tl.int64)
        k = tl.arange(0, BK)
        inner_at = inner_ptr + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * DEPTH + k[None, :]
        first_column = expert * WIDTH + (index % column_blocks) * BN
        if not TMA:
            down_at = down_ptr + expert.to(tl.int64) * down_e + column[None, :] * down_n + k[:, None] * down_k
        out = tl.zeros([BM, BN], tl.float32)
        for start in range(0, DEPTH, BK):
            a = load_rows(inner_at, DEPTH - start, DEPTH % BK == 0, BK)
            if TMA:
                b = down_ptr.load([first_column, start]).T
            else:
                b = load_columns(down_at, DEPTH - start, DEPTH % BK == 0, BK)
                down_at += BK * down_k
            out = matmul(a, b, out, IEEE, UPCAST)
            inner_at += BK
        if bias_ptr is not None:
            out += tl.load(bias_ptr + expert * WIDTH + column)[None, :].to(tl.float32)
        stored = out.to(feature_ptr.dtype.element_ty)
        place = target(order_ptr, row_ptr, rows, live, TOP_K)
        keep = live[:, None] & (columns < WIDTH)[None, :]
        tl.store(feature_ptr + place[:, None] * WIDTH + columns[None, :], stored, mask=keep)
        if partial_ptr is not None:  # the norm of what is stored
            exact = tl.where(keep, stored.to(tl.float32), 0.0)
            at = partial_ptr + rows.to(tl.int64) * column_blocks + index % column_blocks
            tl.store(at, tl.sum(exact * exact, axis=1), mask=live)
        index += tl.num_programs(0)


@triton.jit
def _norm_kernel(
    partial_ptr, order_ptr, offsets_ptr, row_ptr, norm_ptr, column_blocks,
    TOP_K: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    count = tl.load(offsets_ptr + E - 1)
    if tl.program_id(0) * BM < count:
        rows = tl.program_id(0) * BM + tl.arange(0, BM)
        live = rows < count
        column = tl.arange(0, COLUMNS)
        at = partial_ptr + rows.to(tl.int64)[:, None] * column_blocks + column[None, :]
        squares = tl.load(at, mask=live[:, None] & (column < column_blocks)[None, :], other=0.0)
        place = target(order_ptr, row_ptr, rows, live, TOP_K)
        tl.store(norm_ptr + place, tl.sqrt_rn(tl.sum(squares, axis=1)), mask=live)
