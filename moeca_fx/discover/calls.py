"""Calls of a module, and variations of them that proofs are run on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.batch import other_values

_APART = 0.02  # what is left of the differences between tokens in a crowded call


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: int


def changed(call: Call) -> Call:
    """The same shapes, other data."""
    args, kwargs = pytree.tree_map(other_values, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.samples)


def crowded(call: Call) -> Call:
    """Nearly the same token everywhere: all of them ask for the same experts, so that every limit shows."""

    def crowd(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 2 or not leaf.numel():
            return leaf
        rows = leaf.reshape(-1, leaf.shape[-1])
        return (rows[:1] + (rows - rows[:1]) * _APART).to(leaf.dtype).view(leaf.shape)

    args, kwargs = pytree.tree_map(crowd, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.samples)


def redrawn(call: Call, seed: int) -> Call:
    """The same shapes, other data: every floating-point argument of several axes with noise of its own size."""
    generator = torch.Generator().manual_seed(seed)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 2 or not leaf.numel():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf + noise * leaf.abs().mean()

    args, kwargs = pytree.tree_map(change, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.samples)
