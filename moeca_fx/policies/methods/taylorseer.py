"""TaylorSeer (arXiv 2503.06923): every sublayer's output is forecast by finite differences."""

from dataclasses import dataclass
from typing import ClassVar

from moeca_fx.policies.checks import check_integer
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.predictor import Taylor
from moeca_fx.policies.rules import SublayerRule
from moeca_fx.policies.schedule import Cycle


@dataclass(frozen=True)
class TaylorSeer(Method):
    """The first `warmup` steps and every `interval`-th are full; else outputs before the gates are forecast.

    Args:
        interval: cycle length N, usually 4 to 6.
        order: of the expansion O, 0 to 4; O + 1 values a sublayer are kept.
        warmup: full steps at the beginning.
    """

    method: ClassVar[str] = "taylorseer"

    interval: int = 4
    order: int = 1
    warmup: int = 2

    def _check(self) -> None:
        check_integer(self, "order", 0, 4)

    def policy(self) -> Policy:
        """A cycle, Taylor forecasts of sublayers."""
        return Policy(Cycle(self.interval, self.warmup), (SublayerRule(predictor=Taylor(self.order)),))
