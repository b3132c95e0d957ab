"""Bytes to a model and its inputs: a structure of `tests.structures`, mutilated in up to three ways.

    case_of(b"\\x00\\x01...")      Case(structure, seed, batch, mutations)
    check(case)                   None; raises `Unexpected` for anything but success or a documented refusal

Each byte decides one thing, so that a fuzzer which changes one byte changes one thing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import moeca_fx
from moeca_fx.discover import discover
from moeca_fx.errors import InputError, MoecaError, UnsupportedModelError
from tests.fuzz.mutations import MUTATIONS
from tests.structures.model import build
from tests.structures.reasons import reason_of
from tests.structures.structure import AXES, Structure, why_invalid

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
_MUTATIONS = (0, 0, 1, 1, 1, 1, 2, 3)  # how many, evenly drawn
# States of a model that are refused before anything runs; the rest of the reasons is in `tests.structures.reasons`.
_STATES = ("in training mode", "quantised weights", "has forward or backward hooks", "shared by several experts")


class Unexpected(AssertionError):
    """Something other than success or a documented refusal."""


@dataclass(frozen=True)
class Case:
    """What to try.

    Attributes:
        structure, seed, batch: of the model and its inputs.
        mutations: names of `MUTATIONS`, applied in this order.
        transforms: whether to transform too, which takes seconds.
    """

    structure: Structure
    seed: int
    batch: int
    mutations: tuple[str, ...]
    transforms: bool


def case_of(data: bytes) -> Case:
    """The case that bytes stand for; missing bytes are zeros."""
    rest = iter(data)

    def pick(number: int) -> int:
        return next(rest, 0) % number

    names = list(MUTATIONS)
    mutations = tuple(names[pick(len(names))] for _ in range(_MUTATIONS[pick(len(_MUTATIONS))]))
    seed, batch, transforms = pick(8), 1 + pick(3), pick(4) == 3
    values: dict[str, Any] = {}
    for axis, allowed in AXES.items():
        start = pick(len(allowed))
        turned = [*allowed[start:], *allowed[:start]]
        fitting = [value for value in turned if why_invalid({**values, axis: value}) is None]
        values[axis] = (fitting or turned)[0]
    structure = Structure(**values)
    return Case(structure if why_invalid(structure) is None else Structure(), seed, batch, mutations, transforms)


def check(case: Case) -> str:
    """Discover and transform; what came of it.

    Raises:
        Unexpected: an exception that is no documented refusal, or a transformed model that gives something else.
    """
    model, args, kwargs = build(case.structure, case.seed, case.batch)
    for name in case.mutations:
        model, args, kwargs = MUTATIONS[name](model, args, kwargs)
    try:
        discover(model, args, kwargs)
        if not case.transforms:
            return "discovered"
        fast = moeca_fx.transform(model, args, kwargs, policy=None, compile=False)
    except MoecaError as error:
        if not is_documented(error):
            raise Unexpected(f"{case}: undocumented {type(error).__name__}: {error}") from error
        return type(error).__name__
    except Exception as error:
        raise Unexpected(f"{case}: {type(error).__name__}: {error}") from error
    _check_equal(case, model, fast, args, kwargs)
    return "transformed"


def is_documented(error: MoecaError) -> bool:
    """Whether an error is a refusal that the documentation knows."""
    if isinstance(error, UnsupportedModelError) and any(state in str(error) for state in _STATES):
        return True
    return isinstance(error, InputError) or reason_of(error) is not None


def _check_equal(case: Case, model: nn.Module, fast: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        want, have = (pytree.tree_leaves(each(*args, **kwargs)) for each in (model, fast))
    for a, b in zip(want, have, strict=True):
        if not isinstance(a, Tensor) or not a.numel():
            continue
        error = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30))
        if not error <= TOLERANCE.get(a.dtype, 0.0):
            raise Unexpected(f"{case}: the transformed model differs by {error:.1e} relative")
