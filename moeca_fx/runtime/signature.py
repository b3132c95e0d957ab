"""Which calls run the same program: signatures, and calls that are recognised without walking through their inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.autocast import Autocast
from moeca_fx.batch import batch_axis, batch_size

_PLAIN = (int, float, str, bool, type(None), torch.dtype)
_MANY = 64
"""Kinds of calls that are remembered at once; a number that changes at every call makes another each time."""


class Signature(tuple[Any, ...]):
    """What a call must share with another to run the same program: structure, kinds of the leaves, autocast.

    Steps look programs up by it, so its hash, which Python computes piece by piece, is computed once.
    """

    def __hash__(self) -> int:
        known: int | None = self.__dict__.get("known")
        if known is None:
            known = self.__dict__["known"] = super().__hash__()
        return known


def signature_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Signature, list[Any], int]:
    """Signature of a call, its flat inputs and batch size.

    Raises:
        InputError: no tensor with a batch dimension.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    batch = batch_size(args, kwargs)
    return Signature((spec, tuple(_describe(leaf, batch) for leaf in leaves), Autocast.now())), leaves, batch


class Signatures:
    """`signature_of`, faster for calls like an earlier one whose arguments are tensors and plain values."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Signature, int]] = {}

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Signature, list[Any], int]:
        """As `signature_of`."""
        values = [*args, *kwargs.values()]
        kind = _kind_of(values)
        if kind is None:
            return signature_of(args, kwargs)
        key = (len(args), tuple(kwargs), kind, Autocast.now())
        if key in self._known:
            signature, batch = self._known[key]
            return signature, values, batch
        signature, leaves, batch = signature_of(args, kwargs)
        if len(leaves) == len(values) and all(one is other for one, other in zip(leaves, values, strict=True)):
            if len(self._known) >= _MANY:
                self._known.clear()
            self._known[key] = signature, batch
        return signature, leaves, batch


def _kind_of(values: list[Any]) -> tuple[Any, ...] | None:
    """What a signature says about these arguments and more; None where one holds others."""
    kinds: list[tuple[Any, ...]] = []
    for value in values:
        if isinstance(value, Tensor):
            kinds.append((value.shape, value.dtype, value.device))
        elif type(value) in _PLAIN:
            kinds.append((type(value), value))  # the type too: True == 1 == 1.0
        else:
            return None
    return tuple(kinds)


def _describe(leaf: Any, batch: int) -> Any:
    if not isinstance(leaf, Tensor):
        return (type(leaf), leaf if isinstance(leaf, _PLAIN) else repr(leaf))  # the type too: True == 1 == 1.0
    axis = batch_axis(leaf, batch)
    shape = tuple("batch" if index == axis else size for index, size in enumerate(leaf.shape))
    return (shape, leaf.dtype, leaf.device)
