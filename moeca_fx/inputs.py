"""Inputs as every stage may take them, whatever the caller's modes and memory formats are.

    with torch.inference_mode():                          x is an inference tensor: it can be neither traced nor saved
        fast(x.to(memory_format=torch.channels_last))     its strides are not those that the graphs were traced with

A view in a traced graph holds for the strides that it was traced with, and programs for every stride would be compiled
again and again; so tensors that are not contiguous are copied at the door. Results are the same.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.autocast import OFF, Autocast

Inputs = TypeVar("Inputs")


def ordinary(inputs: Inputs) -> Inputs:
    """The same structure with contiguous tensors that need no gradient; copies only what is anything else.

    Call it inside of `ordinary_mode`, else an inference tensor's copy is one again.
    """

    made: Inputs = pytree.tree_map(ordinary_leaf, inputs)
    return made


def ordinary_leaf(leaf: Any) -> Any:
    """One leaf of a structure, as `ordinary` has it."""
    if not isinstance(leaf, Tensor):
        return leaf
    if _is_odd(leaf):
        return leaf.detach().clone(memory_format=torch.contiguous_format)
    return leaf.detach() if leaf.requires_grad else leaf


def _is_odd(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and (tensor.is_inference() or not tensor.is_contiguous())


@contextmanager
def ordinary_mode() -> Iterator[None]:
    """Neither inference mode, whose tensors cannot be written to outside of it, nor gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def no_modes(autocast: Autocast) -> AbstractContextManager[None]:
    """`ordinary_mode` without the `autocast` of now; enters nothing where no mode is on, as in most sampling loops."""
    if torch.is_inference_mode_enabled() or torch.is_grad_enabled() or autocast != OFF:
        return _all_left()
    return nullcontext()


@contextmanager
def _all_left() -> Iterator[None]:
    with ordinary_mode(), OFF.around():
        yield
