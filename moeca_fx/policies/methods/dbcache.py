"""First-block cache and DBCache: run the first blocks, skip the middle ones while what they add hardly changes."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from moeca_fx.policies.checks import check_integer, check_number
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.predictor import Hold, Taylor
from moeca_fx.policies.rules import BlocksRule
from moeca_fx.policies.schedule import FULL, Probe, Schedule


@dataclass(frozen=True)
class FirstBlocksChange(Schedule):
    """Full when the first blocks' residual changed by `threshold` or more since the last full step."""

    threshold: float
    first: int
    warmup: int = 1

    @property
    def probe(self) -> Probe:
        """The first blocks' residual, against the last full step's."""
        return Probe("first_blocks", self.first, against="last_full_step")

    def choose(self, step: int, change: float, memory: Any) -> tuple[int, Any]:
        """See `Schedule.choose`."""
        similar = step >= self.warmup and not math.isnan(change) and change < self.threshold
        return (0 if similar else FULL), memory

    @property
    def settles(self) -> int:
        """Ten steps after the warm-up."""
        return self.warmup + 10


@dataclass(frozen=True)
class DBCache(Method):
    """Dual-block cache; with ``first=1, last=0`` the first-block cache. One decision a batch.

    Args:
        threshold: relative change of the first blocks' residual below which the middle is skipped.
        first, last: blocks F and B that run at every step; F + B is below the number of blocks.
        warmup: full steps at the beginning.
        order: of a Taylor forecast of the middle's residual; 0 holds it.
    """

    method: ClassVar[str] = "dbcache"

    threshold: float = 0.08
    first: int = 1
    last: int = 0
    warmup: int = 1
    order: int = 0

    def _check(self) -> None:
        check_number(self, "threshold")
        check_integer(self, "first", 1)
        check_integer(self, "last", 0)
        check_integer(self, "warmup", 1)
        check_integer(self, "order", 0, 4)

    def policy(self) -> Policy:
        """The first blocks decide; the middle's residual is held or forecast."""
        predictor = Hold() if self.order == 0 else Taylor(self.order)
        rule = BlocksRule(first=self.first, last=self.last, predictor=predictor)
        return Policy(FirstBlocksChange(self.threshold, self.first, self.warmup), (rule,))
