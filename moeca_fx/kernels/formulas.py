"""Shapes and FLOPs of the operations that have kernels for several devices, by namespace in `torch.ops`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def branch_flops(operands: Any) -> int:
    """FLOPs of one branch of ``recompute``, from its operands after the caches."""
    return expert_flops(*operands[4:])


def expert_flops(gate: Any, gate_bias: Any, up: Any, up_bias: Any, down: Any, *rest: Any) -> int:
    """FLOPs of an expert for one row, 2 a multiply-add; from tensors or shapes."""
    shapes = [tuple(w.shape if isinstance(w, Tensor) else w) for w in (gate, up, down) if w is not None]
    return sum(2 * int(outputs) * int(inputs) for _, outputs, inputs in shapes)


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.library.register_fake`, which torch leaves untyped."""
    return lambda function: torch.library.register_fake(name)(function)


def register_shapes(namespace: str) -> None:
    """Register what ``branches``, ``grouped``, ``recompute``, ``decide`` and ``attention_rows`` return."""

    @fake(f"{namespace}::branches")
    def _(x: Tensor, expert: Tensor, gate: Any, gate_bias: Any, up: Tensor, up_bias: Any, down: Tensor, *_: Any) -> Any:
        return x.new_empty(expert.numel(), down.shape[1]), x.new_empty(expert.numel(), dtype=torch.float32)

    @fake(f"{namespace}::grouped")
    def _(x: Tensor, ends: Tensor, gate: Any, gate_bias: Any, up: Tensor, up_bias: Any, down: Tensor, *_: Any) -> Any:
        return x.new_empty(x.shape[0], down.shape[1])

    @fake(f"{namespace}::recompute")
    def _(*_: Any) -> None:
        return None

    @fake(f"{namespace}::decide")
    def _(expert: Tensor, *_: Any) -> Any:
        shape = expert.shape
        weight, code = expert.new_empty(shape, dtype=torch.float32), expert.new_empty(shape, dtype=torch.int8)
        return expert.new_empty(shape), expert.new_empty(shape), weight, code

    @fake(f"{namespace}::attention_rows")
    def _(query: Tensor, key: Tensor, value: Tensor, row: Tensor, scale: float | None) -> Any:
        return query.new_empty(query.shape[0], query.shape[1], value.shape[-1])


def register_flops(namespace: str) -> None:
    """Register what ``branches``, ``grouped``, ``recompute`` and ``attention_rows`` count as."""
    ops = getattr(torch.ops, namespace)

    @register_flop_formula(ops.branches)
    def _(x: Any, expert: Any, *weights: Any, out_shape: Any = None, **_: Any) -> int:
        return int(math.prod(expert)) * expert_flops(*weights)

    @register_flop_formula(ops.grouped)
    def _(x: Any, ends: Any, *weights: Any, out_shape: Any = None, **_: Any) -> int:
        return int(x[0]) * expert_flops(*weights)

    @register_flop_formula(ops.recompute, get_raw=True)
    def _(feature: Any, norm: Any, x: Any, code: Tensor, *rest: Any, **_: Any) -> int:
        # Only where it really runs: how many branches depends on the data (`runtime/flops.py` counts the others).
        return int((code > 0).sum()) * branch_flops((x, code, *rest))

    @register_flop_formula(ops.attention_rows)
    def _(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        rows, heads, width = query
        return int(2 * rows * heads * key[1] * (width + value[-1]))
