"""How the vectors of a cache are stored: in the model's dtype, in bfloat16, or in fp8 with a scale for each."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moeca_fx.errors import ConfigError
from moeca_fx.graph.state import StateSpec

CacheDtype = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Storage:
    """One way to store vectors.

    Attributes:
        dtype: of the stored values.
        scaled: whether each vector (last axis) has a scale, an fp32 state of its own named ``<state>_scale``.
    """

    dtype: torch.dtype
    scaled: bool


_STORAGES = {"bf16": Storage(torch.bfloat16, scaled=False), "fp8": Storage(torch.float8_e4m3fn, scaled=True)}


def find_storage(name: object) -> Storage | None:
    """The storage that a `cache_dtype` names; None keeps the model's dtype.

    Raises:
        ConfigError: it names none.
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in _STORAGES:
        raise ConfigError(
            f"cache_dtype: expected None (the model's dtype), 'bf16' or 'fp8', found {name!r}; pass one of these"
        )
    return _STORAGES[name]


def stored(state: StateSpec, storage: Storage | None) -> tuple[StateSpec, ...]:
    """What a state is stored as: itself, its codes, or its codes and their scales.

    A state that would not become smaller stays as it is: small ones, and vectors of a model in bfloat16 under "bf16".
    """
    if storage is None or not state.vector:
        return (state,)
    states = [replace(state, dtype=storage.dtype, vector=False)]
    if storage.scaled:
        scale = replace(states[0], kind=f"{state.kind}_scale", shape=state.shape[:-1], dtype=torch.float32)
        states.append(scale)
    smaller = sum(part.bytes(1) for part in states) < state.bytes(1)
    return tuple(states) if smaller else (state,)


def stored_states(states: Iterable[StateSpec], storage: Storage | None) -> tuple[StateSpec, ...]:
    """Every state as it is stored, scales after their codes."""
    return tuple(part for state in states for part in stored(state, storage))
