"""`torch.ops.moeca_cpu`: what the library offers, with the shapes it returns and the FLOPs it counts as.

Every operation is the fused form of reference functions; `passes/lower_kernels.py` says of which.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moeca_fx.kernels.cpu.build import load

DTYPES = (torch.float32, torch.bfloat16)
MOST_SLOTS = 128


@functools.cache
def available() -> bool:
    """Whether the kernels are there; builds and loads them at the first call."""
    if not load():
        return False
    _register_shapes()
    _register_flops()
    return True


def recompute_branches(feature: Tensor, norm: Tensor | None, *operands: Any) -> tuple[Tensor, Tensor | None]:
    """Run the branches with a code above zero and write features and norms into the caches, in place.

    Args:
        feature: [B, T, k, H] cache; norm: [B, T, k] cache or None.
        operands: x [R, H], code and slot expert [.., k], token row [R] or None, then the experts' weights.

    Returns:
        The same two tensors.
    """
    torch.ops.moeca_cpu.recompute(feature, norm, *operands)
    return feature, norm


def update_activation_(activation: Tensor, expert: Tensor, beta: float) -> Tensor:
    """`policies.branch.update_activation` in place."""
    torch.ops.moeca_cpu.update_activation(activation, expert, beta)
    return activation


def branch_flops(operands: Any) -> int:
    """FLOPs of one branch of `recompute_branches`, from its operands."""
    return _expert_flops(*operands[4:])


def _expert_flops(gate: Any, gate_bias: Any, up: Any, up_bias: Any, down: Any, *rest: Any) -> int:
    """2 a multiply-add; from tensors or shapes."""
    shapes = [tuple(w.shape if isinstance(w, Tensor) else w) for w in (gate, up, down) if w is not None]
    return sum(2 * int(outputs) * int(inputs) for _, outputs, inputs in shapes)


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.library.register_fake`, which torch leaves untyped."""
    return lambda function: torch.library.register_fake(name)(function)


def _register_shapes() -> None:

    @_fake("moeca_cpu::branches")
    def _(x: Tensor, expert: Tensor, gate: Any, gate_bias: Any, up: Tensor, up_bias: Any, down: Tensor, *_: Any) -> Any:
        return x.new_empty(expert.numel(), down.shape[1]), x.new_empty(expert.numel(), dtype=torch.float32)

    @_fake("moeca_cpu::mixture")
    def _(x: Tensor, *_: Any) -> Any:
        return x.new_empty(x.shape)

    @_fake("moeca_cpu::grouped")
    def _(x: Tensor, ends: Tensor, gate: Any, gate_bias: Any, up: Tensor, up_bias: Any, down: Tensor, *_: Any) -> Any:
        return x.new_empty(x.shape[0], down.shape[1])

    @_fake("moeca_cpu::recompute")
    def _(*_: Any) -> None:
        return None

    @_fake("moeca_cpu::decide")
    def _(expert: Tensor, *_: Any) -> Any:
        shape = expert.shape
        weight, code = expert.new_empty(shape, dtype=torch.float32), expert.new_empty(shape, dtype=torch.int8)
        return expert.new_empty(shape), expert.new_empty(shape), weight, code

    @_fake("moeca_cpu::threshold")
    def _(activation: Tensor, *_: Any) -> Any:
        return activation.new_empty(activation.shape[:2])

    @_fake("moeca_cpu::update_activation")
    def _(*_: Any) -> None:
        return None

    @_fake("moeca_cpu::top_k")
    def _(values: Tensor, k: int) -> Any:
        shape = (*values.shape[:-1], k)
        return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)

    @_fake("moeca_cpu::linear")
    def _(x: Tensor, weight: Tensor, bias: Any) -> Any:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @_fake("moeca_cpu::modulated_norm")
    def _(x: Tensor, *_: Any) -> Any:
        return x.new_empty(x.shape)

    @_fake("moeca_cpu::gated_norm")
    def _(x: Tensor, *_: Any) -> Any:
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @_fake("moeca_cpu::attention_rows")
    def _(query: Tensor, key: Tensor, value: Tensor, row: Tensor, scale: float | None) -> Any:
        return query.new_empty(query.shape[0], query.shape[1], value.shape[-1])


def _register_flops() -> None:
    ops = torch.ops.moeca_cpu

    @register_flop_formula(ops.branches)
    def _(x: Any, expert: Any, *weights: Any, out_shape: Any = None, **_: Any) -> int:
        return int(math.prod(expert)) * _expert_flops(*weights)

    @register_flop_formula(ops.mixture)
    def _(x: Any, expert: Any, weight: Any, *weights: Any, out_shape: Any = None, **_: Any) -> int:
        # As of the reference: the experts, and the weighted sum as a product.
        return int(math.prod(expert)) * (_expert_flops(*weights) + 2 * int(x[-1]))

    @register_flop_formula(ops.grouped)
    def _(x: Any, ends: Any, *weights: Any, out_shape: Any = None, **_: Any) -> int:
        return int(x[0]) * _expert_flops(*weights)

    @register_flop_formula(ops.recompute, get_raw=True)
    def _(feature: Any, norm: Any, x: Any, code: Tensor, *rest: Any, **_: Any) -> int:
        # Only where it really runs: how many branches depends on the data (`runtime/flops.py` counts the others).
        return int((code > 0).sum()) * branch_flops((x, code, *rest))

    @register_flop_formula(ops.linear)
    def _(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * int(math.prod(x)) * int(weight[0])

    @register_flop_formula(ops.attention_rows)
    def _(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        rows, heads, width = query
        return int(2 * rows * heads * key[1] * (width + value[-1]))
