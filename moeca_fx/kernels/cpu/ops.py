"""`torch.ops.moeca_cpu`: what the library offers, with the shapes it returns and the FLOPs it counts as.

Every operation is the fused form of reference functions; `passes/lower_kernels.py` says of which.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moeca_fx.kernels.cpu.build import load
from moeca_fx.kernels.formulas import expert_flops, fake, register_flops, register_shapes

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


def most_siblings() -> int:
    """How many layers one call of ``sibling_linears`` takes."""
    return len(torch.ops.moeca_cpu.sibling_linears.default._schema.arguments[3:]) // 2


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


def _register_shapes() -> None:
    register_shapes("moeca_cpu")

    @fake("moeca_cpu::mixture")
    def _(x: Tensor, *_: Any) -> Any:
        return x.new_empty(x.shape)

    @fake("moeca_cpu::threshold")
    def _(activation: Tensor, *_: Any) -> Any:
        return activation.new_empty(activation.shape[:2])

    @fake("moeca_cpu::update_activation")
    def _(*_: Any) -> None:
        return None

    @fake("moeca_cpu::top_k")
    def _(values: Tensor, k: int) -> Any:
        shape = (*values.shape[:-1], k)
        return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)

    for name in ("linear", "chosen_linear"):

        @fake(f"moeca_cpu::{name}")
        def _(x: Tensor, weight: Tensor, *_: Any) -> Any:
            return x.new_empty(*x.shape[:-1], weight.shape[0])

    @fake("moeca_cpu::sibling_linears")
    def _(x: Tensor, own_up_to: int, onednn_from: int | None, *layers: Tensor | None) -> Any:
        weights = [weight for weight in layers[::2] if weight is not None]
        return x.new_empty(len(weights), x.shape[0], weights[0].shape[0])

    @fake("moeca_cpu::attention")
    def _(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Any:
        batch, heads, tokens = query.shape[:3]
        return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)

    @fake("moeca_cpu::modulated_norm")
    def _(x: Tensor, *_: Any) -> Any:
        return x.new_empty(x.shape)

    @fake("moeca_cpu::gated_norm")
    def _(x: Tensor, *_: Any) -> Any:
        return x.new_empty(x.shape), x.new_empty(x.shape)


def _register_flops() -> None:
    register_flops("moeca_cpu")
    ops = torch.ops.moeca_cpu

    @register_flop_formula(ops.mixture)
    def _(x: Any, expert: Any, weight: Any, *weights: Any, out_shape: Any = None, **_: Any) -> int:
        # As of the reference: the experts, and the weighted sum as a product.
        return int(math.prod(expert)) * (expert_flops(*weights) + 2 * int(x[-1]))

    @register_flop_formula(ops.attention)
    def _(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        batch, heads, tokens, width = query
        return 2 * int(math.prod((batch, heads, tokens, key[2]))) * (int(width) + int(value[-1]))

    @register_flop_formula((ops.linear, ops.chosen_linear))
    def _(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * int(math.prod(x)) * int(weight[0])

    @register_flop_formula(ops.sibling_linears)
    def _(x: Any, own_up_to: int, onednn_from: Any, *layers: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * int(math.prod(x)) * sum(int(weight[0]) for weight in layers[::2] if weight is not None)
