"""Triton kernels of a cached step: plain functions on tensors, importable without a GPU (triton must be installed).

Every size that depends on data stays on the device, shapes are static and nothing waits for the device, so that a CUDA
graph can capture a step. `decide` picks branches, `plan` groups them by expert, `gated_experts` computes them in place
in the feature cache, `combine_slots` sums a token's features, `attention_rows_masked` attends for refreshed tokens.
"""

from moeca_fx.kernels.triton_gpu._common import INTERPRETED
from moeca_fx.kernels.triton_gpu.attention_rows import attention_rows_masked, attention_rows_packed, listed_rows
from moeca_fx.kernels.triton_gpu.combine import combine_slots
from moeca_fx.kernels.triton_gpu.decide import decide
from moeca_fx.kernels.triton_gpu.grouped_gemm import gated_experts
from moeca_fx.kernels.triton_gpu.grouped_mm import grouped_mm_experts
from moeca_fx.kernels.triton_gpu.plan import plan
from moeca_fx.kernels.triton_gpu.tiles import Tile, Tiles, default_tiles, tuned_tiles

__all__ = [
    "INTERPRETED",
    "Tile",
    "Tiles",
    "attention_rows_masked",
    "attention_rows_packed",
    "combine_slots",
    "decide",
    "default_tiles",
    "gated_experts",
    "grouped_mm_experts",
    "listed_rows",
    "plan",
    "tuned_tiles",
]
