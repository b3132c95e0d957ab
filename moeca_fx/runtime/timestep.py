"""Find the timestep among a model's inputs, and recognise a new trajectory from it."""

import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from moeca_fx.errors import InputError
from moeca_fx.reasons import Reason


class Announced(Enum):
    """What stands for a timestep where every call comes within a session, which announces its steps."""

    ANNOUNCED = "announced"


ANNOUNCED: Final = Announced.ANNOUNCED
Times = tuple[float, ...]
"""Timesteps of a call as Python numbers: comparing a few costs less than an operation on tensors."""
aten = torch.ops.aten
_WAVES = (aten.sin.default, aten.cos.default)
_COMMON_NAMES = ("t", "timestep", "timesteps", "time", "sigma", "sigmas")
_SEARCH_DEPTH = 12


def find_timestep(
    model: nn.Module,
    module: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    named: str | int | None,
) -> int:
    """Index of the timestep among the flat inputs.

    By structure: the one small numeric tensor whose first uses lead to a sine or cosine (the sinusoidal embedding). If
    that is not unique, by a common parameter name. `named`, a parameter name or a position in `args`, overrides both.

    Raises:
        InputError: it cannot be told which input is the timestep, or `named` fits none.
    """
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    owners = _parameter_of_each_leaf(model, args, kwargs)
    if named is not None:
        return _named_timestep(named, leaves, owners, args)
    candidates = [index for index, leaf in enumerate(leaves) if _is_small_number_tensor(leaf)]
    placeholders = module.graph.find_nodes(op="placeholder")
    waves = [index for index in candidates if _leads_to_wave(placeholders[index])]
    by_name = [index for index in candidates if owners[index] in _COMMON_NAMES]
    for found in (waves, by_name):
        if len(found) == 1:
            return found[0]
    names = ", ".join(owners[index] for index in candidates) or "none"
    raise InputError(
        f"cannot tell which input of {type(model).__name__} is the timestep: expected one tensor of shape [] or [B] "
        f"that feeds a sinusoidal embedding, candidates are: {names}; pass timestep='<parameter name>' to transform",
        code=Reason.TIMESTEP,
    )


def _named_timestep(named: str | int, leaves: list[Any], owners: list[str], args: tuple[Any, ...]) -> int:
    if isinstance(named, int):
        matches = [len(pytree.tree_leaves(args[:named]))] if 0 <= named < len(args) else []
    else:
        matches = [index for index, owner in enumerate(owners) if owner == named]
    if len(matches) != 1 or not _is_small_number_tensor(leaves[matches[0]]):
        raise InputError(
            f"timestep={named!r}: expected the name or position of one tensor input of shape [] or [B], found "
            f"{'none' if not matches else 'something else'}; the inputs are {', '.join(owners)}",
            code=Reason.TIMESTEP,
        )
    return matches[0]


def _parameter_of_each_leaf(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Name of forward's parameter that each flat input belongs to."""
    parameters = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    owners: list[str] = []
    for index, value in enumerate(args):
        name = parameters[index] if index < len(parameters) else f"argument {index}"
        owners += [name] * len(pytree.tree_leaves(value))
    for name, value in kwargs.items():
        owners += [name] * len(pytree.tree_leaves(value))
    return owners


def _is_small_number_tensor(leaf: Any) -> bool:
    return (
        isinstance(leaf, Tensor) and leaf.dtype != torch.bool and leaf.numel() == (leaf.shape[0] if leaf.dim() else 1)
    )


def _leads_to_wave(placeholder: fx.Node) -> bool:
    """Whether a sine or cosine is reached within a few element-wise or shape operations."""
    frontier = [placeholder]
    for _ in range(_SEARCH_DEPTH):
        users = [user for node in frontier for user in node.users]
        if any(user.target in _WAVES for user in users):
            return True
        frontier = [user for user in users if user.target not in (aten.linear.default, aten.embedding.default)]
    return False


def timestep_value(leaf: Tensor) -> Times:
    """The timesteps of a call on the host, one or one a sample."""
    return tuple(leaf.detach().flatten().tolist())


def jumped_back(now: Times, before: Times, direction: int) -> bool:
    """Whether any sample's timestep moved against the trajectory's `direction` (+1, -1; 0 is not known yet)."""
    return any((one - other) * direction < 0 for one, other in zip(now, before, strict=True))


def direction_of(now: Times, before: Times) -> int:
    """+1 when timesteps grow, -1 when they fall, 0 when they stand still."""
    moved = sum(now) - sum(before)
    return (moved > 0) - (moved < 0)
