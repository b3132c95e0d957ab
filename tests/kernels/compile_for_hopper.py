"""Compiles every kernel for compute capability 9.0 on a machine without a GPU; prints what each needs as JSON lines.

Run as a program, without TRITON_INTERPRET: a stand-in driver names the target, and launches compile without running.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_launch = JITFunction.run


def _compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled = _launch(kernel, *args, grid=grid, warmup=True, **options)
    shared, wgmma = compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"]
    found = {"kernel": kernel.__name__, "exact": options.get("IEEE", False), "shared": shared, "wgmma": wgmma}
    sys.stdout.write(json.dumps(found) + "\n")
    return compiled


def _stand_in() -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    JITFunction.run = _compile_only
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)


def _compile_all() -> None:
    from moeca_fx.kernels import triton_gpu as kernels
    from moeca_fx.kernels.triton_gpu import tiles as sizes

    batch, tokens, top_k, experts = 2, 256, 5, 48
    integers = torch.zeros(batch, tokens, top_k, dtype=torch.int64)
    weight = torch.zeros(batch, tokens, top_k)
    kernels.decide(integers, weight, integers, weight, weight, torch.zeros(batch, experts), 1.1, 0.6, "share")
    order, offsets, _ = kernels.plan(integers.flatten(0, 1).to(torch.int8), integers.flatten(0, 1), experts)

    def run_experts(width: int, inner: int, dtype: torch.dtype, tiles: kernels.Tiles | None) -> None:
        x = torch.zeros(batch * tokens, width, dtype=dtype)
        up = torch.zeros(experts, inner, width, dtype=dtype)
        feature = torch.zeros(batch * tokens * top_k, width, dtype=dtype)
        norm = torch.zeros(feature.shape[0])
        down = up.transpose(1, 2).contiguous()
        kernels.gated_experts(x, order, offsets, top_k, up, up, down, feature, norm=norm, tiles=tiles)

    for tiles in sizes._CANDIDATES:
        run_experts(1024, 448, torch.bfloat16, tiles)
    run_experts(115, 115, torch.bfloat16, None)
    run_experts(384, 128, torch.float32, None)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        kernels.combine_slots(torch.zeros(batch, tokens, top_k, 384).to(dtype), weight, weight)
    for heads, depth in ((6, 64), (16, 72)):
        query = torch.zeros(batch, tokens, heads, depth, dtype=torch.bfloat16)
        kernels.attention_rows_masked(query, query, query, torch.zeros(batch, tokens, dtype=torch.bool))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _compile_operations(dtype)


def _compile_operations(
    dtype: torch.dtype, tokens: int = 64, width: int = 72, inner: int = 9, experts: int = 4
) -> None:
    """What graphs call, with and without biases, gate, token rows and norms; odd widths."""
    from moeca_fx.kernels.triton_gpu import ops

    experts, share = 4, torch.zeros(1, tokens, 2)
    x, routing = torch.zeros(tokens, width, dtype=dtype), torch.zeros(tokens, 2, dtype=torch.int64)
    up, down = torch.zeros(experts, inner, width, dtype=dtype), torch.zeros(experts, width, inner, dtype=dtype)
    feature, code, row = torch.zeros(1, tokens, 2, width, dtype=dtype), routing.to(torch.int8), torch.arange(tokens)
    biased = (up, up[..., 0], up, up[..., 0], down, down[..., 0], 2)
    ops.branches(x, routing, *biased)
    ops.grouped(x, torch.zeros(experts, dtype=torch.int64), None, None, up, None, down, None, 1)
    ops.recompute(feature, share, x, code, routing, row, up, None, up, None, down, None, 0)
    ops.recompute(feature, None, x, code, routing, None, *biased)
    heads = torch.zeros(1, tokens, 2, 36, dtype=dtype)
    ops.attention_rows(heads[0], heads, heads, row, None)
    slots, limit = routing.unsqueeze(0), torch.zeros(1, experts)
    ops.decide(slots, share.to(dtype), slots, share, share, limit, None, 1.1, 0.6, True, None)


if __name__ == "__main__":
    _stand_in()
    _compile_all()
