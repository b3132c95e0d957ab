"""The batch of a call: which size it is, and inputs of another."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.errors import InputError
from moeca_fx.reasons import Reason


def at_least_two(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one: torch.export would fix a batch size of 1 in the graph."""
    size = batch_size(args, kwargs)
    if size != 1:
        return args, dict(kwargs)

    def double(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 1 else leaf

    return pytree.tree_map(double, args), pytree.tree_map(double, dict(kwargs))


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The leading size that most tensor inputs of at least two dimensions share; of one dimension, if there are none.

    Raises:
        InputError: no tensor with a batch dimension among the inputs.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = [int(leaf.shape[0]) for leaf in tensors if leaf.dim() > 1] or [int(leaf.shape[0]) for leaf in tensors]
    if not sizes:
        raise InputError(
            "example inputs: expected at least one tensor with a leading batch dimension, found none; "
            "pass example_inputs=(x, t, ...) as the model's forward takes them",
            code=Reason.INPUTS,
        )
    return max(sizes, key=sizes.count)  # the first of equally frequent ones


def doubled(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Twice the samples, the second half with other values of the same kind."""
    size = batch_size(args, kwargs)

    def double(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != size:
            return leaf
        return torch.cat([leaf, other_values(leaf)])

    return pytree.tree_map(double, args), pytree.tree_map(double, dict(kwargs))


def other_values(leaf: Any) -> Any:
    """Other values of the same shape and kind: floats scaled and mirrored, integers in another order."""
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    return leaf.flip(0) * 0.75 if leaf.is_floating_point() else leaf.flip(0)
