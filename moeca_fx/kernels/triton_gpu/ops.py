"""`torch.ops.moeca_gpu`: those operations of `torch.ops.moeca_cpu` that have Triton kernels, with the same signatures.

They are opaque to the compiler (`custom_op`, not `triton_op`): tiles and the way weights are read follow addresses and
the device's properties, which a trace does not have. Launches go to the device that holds the operands. Importing this
module registers the operations, their shapes and their FLOPs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_fx.graph.gated_form import ACTIVATIONS
from moeca_fx.kernels.formulas import register_flops, register_shapes
from moeca_fx.kernels.triton_gpu.attention_rows import attention_rows_packed
from moeca_fx.kernels.triton_gpu.decide import decide as decide_by_score
from moeca_fx.kernels.triton_gpu.grouped_gemm import gated_experts
from moeca_fx.kernels.triton_gpu.plan import plan

_EXPERTS = "Tensor? gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, int activation"


@torch.library.custom_op(
    "moeca_gpu::branches", mutates_args=(), schema=f"(Tensor x, Tensor expert, {_EXPERTS}) -> (Tensor, Tensor)"
)
def branches(x: Tensor, expert: Tensor, *experts: Any) -> tuple[Tensor, Tensor]:
    """All branches: token rows x [.., H] (N of them) and expert with N*k ids -> features [N*k, H] and norms [N*k]."""
    tokens, count = x.numel() // x.shape[-1], expert.numel()
    *weights, activation = experts
    feature, norm = x.new_empty(count, weights[4].shape[1]), x.new_empty(count, dtype=torch.float32)
    if count:
        expert = expert.reshape(tokens, count // tokens)
        code = torch.ones(expert.shape, dtype=torch.int8, device=expert.device)
        _run_planned(x, code, expert, None, weights, activation, feature, norm)
    return feature, norm


@torch.library.custom_op("moeca_gpu::grouped", mutates_args=(), schema=f"(Tensor x, Tensor ends, {_EXPERTS}) -> Tensor")
def grouped(x: Tensor, ends: Tensor, *experts: Any) -> Tensor:
    """Rows x [M, H] grouped by expert, each expert's end row [E] -> [M, H]: every row is a token with one branch."""
    *weights, activation = experts
    out = x.new_empty(x.shape[0], weights[4].shape[1])
    order = torch.arange(x.shape[0], device=x.device)
    _run_experts(x, order, ends.to(torch.int32), 1, None, weights, activation, out, None)
    return out


@torch.library.custom_op(
    "moeca_gpu::recompute",
    mutates_args=("feature", "norm"),
    schema="(Tensor(a!) feature, Tensor(b!)? norm, Tensor x, Tensor code, Tensor slot_expert, Tensor? row, "
    f"{_EXPERTS}) -> ()",
)
def recompute(
    feature: Tensor,
    norm: Tensor | None,
    x: Tensor,
    code: Tensor,
    slot_expert: Tensor,
    row: Tensor | None,
    *experts: Any,
) -> None:
    """Branches with a code above zero, into the caches feature [B, T, k, H] and norm [B, T, k].

    x: [.., H], R rows; code, slot_expert: [.., k], one entry a row; row: [R] flat token of each, None where they are
    all tokens in order. How many branches run stays on the device.
    """
    if code.numel() == 0:
        return
    shape = (code.numel() // code.shape[-1], code.shape[-1])
    features = feature.view(-1, feature.shape[-1])
    norms = None if norm is None else norm.view(-1)
    *weights, activation = experts
    _run_planned(x, code.reshape(shape), slot_expert.reshape(shape), row, weights, activation, features, norms)


@torch.library.custom_op("moeca_gpu::decide", mutates_args=())
def decide(
    expert: Tensor,
    weight: Tensor,
    cached_expert: Tensor,
    cached_weight: Tensor,
    cached_norm: Tensor | None,
    threshold: Tensor | None,
    picked: Tensor | None,
    lambda1: float,
    lambda2: float,
    share: bool,
    margin: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`policies.branch.decide`. The kernel scores: without norms and thresholds, or with a pick, it refuses."""
    if cached_norm is None or threshold is None or picked is not None or margin is not None:
        raise ValueError(
            "moeca_gpu::decide: expected norms and thresholds, no pick and no margin; use policies.branch.decide_picked"
        )
    with torch.cuda.device_of(expert):
        return decide_by_score(
            *(expert, weight, cached_expert, cached_weight, cached_norm, threshold),
            lambda1,
            lambda2,
            "share" if share else "raw",
        )


@torch.library.custom_op("moeca_gpu::attention_rows", mutates_args=())
def attention_rows(query: Tensor, key: Tensor, value: Tensor, row: Tensor, scale: float | None) -> Tensor:
    """`ops.attention_rows` without padding and without waiting for the device."""
    with torch.cuda.device_of(query):
        return attention_rows_packed(query, key, value, row.contiguous(), scale)


def _run_planned(
    x: Tensor,
    code: Tensor,
    expert: Tensor,
    row: Tensor | None,
    weights: Sequence[Tensor | None],
    activation: int,
    feature: Tensor,
    norm: Tensor | None,
) -> None:
    """The branches of [R, k] codes, grouped by expert."""
    up = weights[2]
    assert up is not None
    with torch.cuda.device_of(x):
        order, offsets, _ = plan(code, expert, up.shape[0])
    _run_experts(x, order, offsets, code.shape[1], row, weights, activation, feature, norm)


def _run_experts(
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    row: Tensor | None,
    weights: Sequence[Tensor | None],
    activation: int,
    feature: Tensor,
    norm: Tensor | None,
) -> None:
    """`gated_experts` on weights as an expert program holds them: views, and biases that are views."""
    gate, gate_bias, up, up_bias, down, down_bias = weights
    assert up is not None and down is not None
    row, gate_bias, up_bias, down_bias = (
        tensor if tensor is None else tensor.contiguous() for tensor in (row, gate_bias, up_bias, down_bias)
    )
    with torch.cuda.device_of(x):
        gated_experts(
            *(x.reshape(-1, x.shape[-1]), order, offsets, top_k, gate, up, down, feature),
            norm=norm,
            row=row,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down_bias,
            activation=ACTIVATIONS[activation],
        )


register_shapes("moeca_gpu")
register_flops("moeca_gpu")
