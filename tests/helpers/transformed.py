"""Transformed tiny models, made once a session and given out as new: no trajectories, statistics or warnings."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.toys import Toy, toy, toy_inputs
from tests.helpers.zoo_models import Family

SOME = MoECa(tau0=0.6)  # on the inputs of `zoo_models.trajectory`, part of the branches is recomputed


@cache
def _zoo_plain(family: Family) -> tuple[nn.Module, TransformedModel]:
    model = zoo_models.tiny(family)
    return model, moeca_fx.transform(model, zoo_models.inputs(), policy=None)


@cache
def _zoo_pair(family: Family, policy: MoECa | None) -> tuple[nn.Module, TransformedModel]:
    model, plain = _zoo_plain(family)
    return model, plain.with_policy(policy)


@cache
def _toy_plain() -> tuple[Toy, TransformedModel]:
    model = toy()
    return model, moeca_fx.transform(model, toy_inputs(), policy=None)


@cache
def _toy_pair(policy: MoECa | None) -> tuple[Toy, TransformedModel]:
    model, plain = _toy_plain()
    return model, plain.with_policy(policy)


def zoo_pair(family: Family = "dsmoe", policy: MoECa | None = SOME) -> tuple[nn.Module, TransformedModel]:
    """(original, transformed) of a zoo family; do not change their weights."""
    model, fast = _zoo_pair(family, policy)
    return model, as_new(fast)


def toy_pair(policy: MoECa | None = SOME) -> tuple[Toy, TransformedModel]:
    """(original, transformed) toy; do not change their weights."""
    model, fast = _toy_pair(policy)
    return model, as_new(fast)


def as_new(fast: TransformedModel) -> TransformedModel:
    """Drop trajectories, statistics, given warnings and every program but the one that `transform` made."""
    programs = fast._moeca.programs
    for signature in list(programs)[1:]:
        del programs[signature]
    fast._moeca.trajectories.clear()
    fast._moeca.advice.given.clear()
    fast.reset_stats()
    return fast


def run(fast: nn.Module, steps: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The predictions of consecutive calls, copied."""
    with torch.no_grad():
        return [zoo_models.prediction(fast(*inputs)).clone() for inputs in steps]
