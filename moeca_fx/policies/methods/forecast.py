"""Forecast of the model's output: no cache in the network; a multistep solver in disguise."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.predictor import Lagrange, Predictor, Taylor
from moeca_fx.policies.rules import OutputRule
from moeca_fx.policies.schedule import Cycle


@dataclass(frozen=True)
class Forecast(Method):
    """The first `warmup` steps and every `interval`-th are full; else the output is forecast, nothing runs.

    Args:
        interval: cycle length N.
        order: 0 holds the output (fewer steps of the same solver, for Euler), 1 continues its last change, ...
        warmup: full steps at the beginning.
        basis: ``"taylor"`` (finite differences over i!, as TaylorSeer) or ``"lagrange"`` (the polynomial through
            the values); the same up to order 1.
    """

    method: ClassVar[str] = "forecast"

    interval: int = 4
    order: int = 1
    warmup: int = 2
    basis: Literal["taylor", "lagrange"] = "taylor"

    def policy(self) -> Policy:
        """A cycle, forecasts of the output."""
        predictor: Predictor = Taylor(self.order) if self.basis == "taylor" else Lagrange(self.order)
        return Policy(Cycle(self.interval, self.warmup), (OutputRule(predictor=predictor),))
