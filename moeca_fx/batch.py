"""The batch of a call: which size it is and which axis of an input, told from shapes alone; inputs of another.

    latents [2, 16, 64, 64], timesteps [2], pooled [2, 2048]                 axis 0
    hidden states of 48 text layers [48, 2, 128, 4096]                 -->   axis 1
    rotary table [4096, 2, 64], label 7                                      none

The batch size is what most arguments of the call agree on. Most tensors carry it in front; only one of at least four
dimensions may hold it second, behind a stack of layers: rotary tables of three are rarely per sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.errors import InputError
from moeca_fx.reasons import Reason

_STACKED = 4
"""Dimensions from which on a tensor may be a stack of batches."""


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The leading size that most arguments of a call share.

    Each argument has one vote: the size that most of its tensors of at least two dimensions lead with. Of equally
    frequent sizes, the one that more one-dimensional tensors (timesteps) have wins, then the first. Without any tensor
    of two dimensions, those of one decide.

    Raises:
        InputError: no tensor with a batch dimension among the inputs, or no sample.
    """
    arguments = [_sizes(value) for value in (*args, *kwargs.values())]
    votes = [_most_frequent(wide) for wide, _ in arguments if wide]
    vectors = [size for _, narrow in arguments for size in narrow]
    if not votes and not vectors:
        raise InputError(
            "example inputs: expected at least one tensor with a leading batch dimension, found none; "
            "pass example_inputs=(x, t, ...) as the model's forward takes them",
            code=Reason.INPUTS,
        )
    size = max(votes, key=lambda size: (votes.count(size), vectors.count(size))) if votes else _most_frequent(vectors)
    if not size:
        raise InputError("inputs: expected at least one sample, found a batch of 0; leave the call out")
    return size


def batch_axis(leaf: Any, size: int) -> int | None:
    """The axis of an input that runs over the samples; None for numbers and what all samples share.

    Args:
        leaf: any leaf of the inputs.
        size: the batch size.
    """
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return None
    if leaf.shape[0] == size:
        return 0
    if leaf.dim() < _STACKED or leaf.shape[1] != size:
        return None
    return 1 if list(leaf.shape).count(size) == 1 or size > 1 else None


def may_be_stacked(leaf: Any, size: int) -> bool:
    """Whether shapes leave it open which of a tensor's first two axes is the batch, or it is the second."""
    return isinstance(leaf, Tensor) and leaf.dim() >= _STACKED and leaf.shape[1] == size


def at_least_two(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one: torch.export would fix a batch size of 1 in the graph."""
    if batch_size(args, kwargs) != 1:
        return args, dict(kwargs)

    def double(leaf: Any) -> Any:
        axis = batch_axis(leaf, 1)
        return leaf if axis is None else torch.cat([leaf, leaf], dim=axis)

    return pytree.tree_map(double, args), pytree.tree_map(double, dict(kwargs))


def doubled(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Twice the samples, the second half with other values of the same kind."""
    size = batch_size(args, kwargs)

    def double(leaf: Any) -> Any:
        axis = batch_axis(leaf, size)
        return leaf if axis is None else torch.cat([leaf, other_values(leaf)], dim=axis)

    return pytree.tree_map(double, args), pytree.tree_map(double, dict(kwargs))


def other_values(leaf: Any) -> Any:
    """Other values of the same shape and kind: floats scaled and mirrored, integers in another order."""
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    return leaf.flip(0) * 0.75 if leaf.is_floating_point() else leaf.flip(0)


def _sizes(value: Any) -> tuple[list[int], list[int]]:
    """Leading sizes of an argument's tensors: of those with at least two dimensions, and of those with one."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim()]
    wide = [int(leaf.shape[0]) for leaf in tensors if leaf.dim() > 1]
    return wide, [int(leaf.shape[0]) for leaf in tensors if leaf.dim() == 1]


def _most_frequent(sizes: Sequence[int]) -> int:
    return max(sizes, key=sizes.count)  # the first of equally frequent ones
