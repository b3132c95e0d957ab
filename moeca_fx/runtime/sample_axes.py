"""Along which axis of each input a call is cut into chunks, where shapes alone do not tell.

batch 4, hidden states of 4 text layers [4, 4, 128, 4096]: axis 0 or axis 1?
model(two samples)[0] == model(one sample)[0]  when cut along axis 1, an error or another result along axis 0
"""

from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.autocast import computed_in
from moeca_fx.batch import batch_axis, may_be_stacked
from moeca_fx.errors import UnsupportedModelError
from moeca_fx.reasons import Reason

Axes = tuple[int | None, ...]
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative; a wrong cut changes what the model reads, not the last digits. Half precision: 5 %."""
_MOST = 8
"""Combinations that are tried."""


def plain_axes(leaves: Sequence[Any], batch: int) -> Axes:
    """The axis over the samples of every flat input, as shapes suggest it."""
    return tuple(batch_axis(leaf, batch) for leaf in leaves)


def cut(leaves: Sequence[Any], axes: Axes, start: int, size: int) -> list[Any]:
    """The flat inputs of `size` samples; what has no axis over the samples is passed on."""
    return [leaf if axis is None else leaf.narrow(axis, start, size) for leaf, axis in zip(leaves, axes, strict=True)]


def find_axes(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, batch: int) -> Axes:
    """As `plain_axes`; where those may be wrong, what the model's own results for one and for two samples say.

    Args:
        model: the original.
        leaves, spec: flat (args, kwargs) of a call and how they unfold.
        batch: its batch size.

    Raises:
        UnsupportedModelError: no way to cut the inputs leaves a sample's result as it is.
    """
    plain = plain_axes(leaves, batch)
    if batch == 1 or not any(may_be_stacked(leaf, batch) for leaf in leaves):
        return plain
    options = [_options(leaf, axis, batch) for leaf, axis in zip(leaves, plain, strict=True)]
    for axes in islice(product(*options), _MOST):
        if _is_cut_along(model, leaves, spec, axes):
            return axes
    raise UnsupportedModelError(
        f"{type(model).__name__}: expected the result of one sample to be the same alone and beside another, found "
        "another along every axis that may hold samples; samples may depend on each other: leave out chunk and "
        "cache_limit, or call it with one sample at a time",
        code=Reason.MIXES_SAMPLES,
    )


def _options(leaf: Any, axis: int | None, batch: int) -> tuple[int | None, ...]:
    if not may_be_stacked(leaf, batch):
        return (axis,)
    return (0, 1) if axis == 0 else (1, None)


def _is_cut_along(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, axes: Axes) -> bool:
    def results(size: int) -> Iterator[Tensor]:
        args, kwargs = pytree.tree_unflatten(cut(leaves, axes, 0, size), spec)
        found = pytree.tree_leaves(model(*args, **kwargs))
        return (leaf[:1].float() for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point())

    tolerance = min(_TOLERANCE.get(computed_in(leaf.dtype), 5e-2) for leaf in model.parameters())
    try:
        with torch.no_grad():
            pairs = list(zip(results(1), results(2), strict=True))
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False  # such inputs the model cannot take
    return all(
        one.shape == two.shape and float((one - two).abs().max()) <= tolerance * float(two.abs().max())
        for one, two in pairs
    )
