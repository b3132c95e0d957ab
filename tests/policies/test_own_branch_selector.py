"""A branch selector of one's own needs no change elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx.errors import ConfigError
from moeca_fx.policies import Policy
from moeca_fx.policies.predictor import Hold, Lagrange
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.schedule import Cycle
from moeca_fx.policies.selector import BranchPicker, BranchSelector, BranchSignal, Budget, Unmatched
from moeca_fx.zoo.sampling import sample
from tests.helpers import zoo_models

STEPS = 8


def pick_even_experts_over(expert: Tensor, score: Tensor, least: float) -> Tensor:
    """Slots of experts with an even number that score more than `least`."""
    return (expert % 2 == 0) & (score > least)


@dataclass(frozen=True)
class EvenExperts(BranchPicker):
    least: float = 0.0

    @property
    def signals(self) -> tuple[BranchSignal, ...]:
        return ("expert", "score")

    @property
    def function(self) -> Callable[..., Tensor]:
        return pick_even_experts_over

    def arguments(self) -> tuple[float, ...]:
        return (self.least,)


def recomputed(selector: BranchSelector) -> int:
    model = zoo_models.tiny_dsmoe()
    inputs = zoo_models.inputs(2)
    policy = Policy(Cycle(4, 1), (BranchRule(predictor=Hold(), selector=selector),))
    fast = moeca_fx.transform(model, inputs, policy=policy)
    sample(fast, inputs[0], torch.arange(2), STEPS)
    stats = fast.stats()
    assert stats.cached_steps == 6
    return stats.recomputed_branches


@pytest.mark.slow
def test_it_recomputes_more_than_nothing_and_less_than_all() -> None:
    none, some, high = (recomputed(each) for each in (Unmatched(), EvenExperts(), EvenExperts(least=1e9)))
    everything = recomputed(Budget(share=1.0))
    assert none == high < some < everything


def test_selectors_that_cannot_work() -> None:
    class Strange(BranchSelector):
        signals = ()

    with pytest.raises(ConfigError, match="expected a ScoreThreshold or a BranchPicker, found Strange"):
        BranchRule(selector=Strange())
    with pytest.raises(ConfigError, match="'error' is what a forecast missed"):
        BranchRule(predictor=Hold(), selector=Budget(by="error"))
    assert BranchRule(predictor=Lagrange(1), selector=Budget(by="error"))
