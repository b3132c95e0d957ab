"""Forecast sublayers on any schedule, and recompute the tokens whose forecast missed most at the last full step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moeca_fx.policies.checks import check_integer, check_number
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.predictor import Hold, Lagrange
from moeca_fx.policies.rules import SublayerRule
from moeca_fx.policies.schedule import Cycle, Listed, Schedule
from moeca_fx.policies.selector import Place, Signal, TokenSelector


def worst_tokens(error: Tensor, clock: Tensor, share: float) -> Tensor:
    """The `share` of each sample's tokens with the largest error, the first of equals: [B, T] -> bool [B, T]."""
    rank = error.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen: Tensor = rank < round(share * error.shape[1])
    return chosen


@dataclass(frozen=True)
class LargestError(TokenSelector):
    """Tokens by the norm of what their forecast missed at the last full step."""

    share: float

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The measured error."""
        return ("error",)

    @property
    def function(self) -> Callable[..., Tensor]:
        """`worst_tokens`."""
        return worst_tokens

    def arguments(self, place: Place) -> tuple[Any, ...]:
        """The share."""
        return (self.share,)


@dataclass(frozen=True)
class SublayerForecast(Method):
    """Attention, feed-forward and MoE outputs before their gates, forecast on a cycle or on listed full steps.

    Args:
        order: of the polynomial through the last outputs; 0 holds them.
        interval, warmup: of a fixed cycle, used when `full` is empty.
        steps, full: length of the trajectory and its full steps, of a calibrated schedule.
        share: of the tokens of every feed-forward and MoE layer, recomputed by measured forecast error; 0 is none.
    """

    method: ClassVar[str] = "sublayer_forecast"

    order: int = 1
    interval: int = 4
    warmup: int = 2
    steps: int = 0
    full: tuple[int, ...] = ()
    share: float = 0.0

    def _check(self) -> None:
        check_integer(self, "order", 0, 4)
        check_number(self, "share", "a number in [0, 1]", upper=1.0 + 1e-12)

    def policy(self) -> Policy:
        """A cycle or a list of full steps; forecasts of sublayers."""
        schedule: Schedule = Listed(self.full, self.steps) if self.full else Cycle(self.interval, self.warmup)
        predictor = Lagrange(self.order) if self.order else Hold()
        selector = LargestError(self.share) if self.share else None
        return Policy(schedule, (SublayerRule(predictor=predictor, selector=selector),))
