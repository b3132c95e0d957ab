"""Forecast expert branches: MoECa's matching, with features extrapolated instead of held, on any schedule."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moeca_fx.errors import ConfigError
from moeca_fx.policies.checks import check_integer
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.predictor import Hold, Lagrange
from moeca_fx.policies.rules import AttentionMode, BranchRule
from moeca_fx.policies.schedule import Cycle, Listed, Schedule
from moeca_fx.policies.selector import BranchSelector, Budget, ScoreThreshold, Unmatched


@dataclass(frozen=True)
class BranchForecast(Method):
    """MoECa's branches under the current routing weights, each forecast from its features at the last full steps.

    Args:
        order: of the polynomial through the last features (`Lagrange`); 0 holds them.
        interval, warmup: of a fixed cycle, used when `full` is empty.
        steps, full: length of the trajectory and its full steps, of a calibrated schedule.
        sampler: name of the sampler that schedule was calibrated with; empty where it does not matter.
        select: what is recomputed besides branches that are new to the cache: ``"none"``, ``"score"`` over MoECa's
            threshold, or a share of the branches by ``"score_budget"`` or ``"error_budget"`` (what the forecast missed
            at the last full step).
        share: of a budget.
        tau0: base threshold of ``"score"``.
        margin: a new expert takes a slot only when its routing share exceeds the slot's by more than this; None always.
        attention: as in `MoECa`.
    """

    method: ClassVar[str] = "branch_forecast"

    order: int = 1
    interval: int = 4
    warmup: int = 2
    steps: int = 0
    full: tuple[int, ...] = ()
    sampler: str = ""
    select: Literal["none", "score", "score_budget", "error_budget"] = "none"
    share: float = 0.1
    tau0: float = 0.8
    margin: float | None = None
    attention: AttentionMode = "synchronized"

    def _check(self) -> None:
        check_integer(self, "order", 0, 4)
        if self.margin is not None and self.select == "score":
            raise ConfigError(
                "BranchForecast.margin: expected None with select='score', which decides by threshold alone"
            )
        if self.order == 0 and self.select == "error_budget":
            raise ConfigError(
                "BranchForecast.select: 'error_budget' ranks by what a forecast missed, and order 0 forecasts nothing; "
                "set order to 1, or select='score_budget'"
            )

    def policy(self) -> Policy:
        """A cycle or a list of full steps; forecasts of branches."""
        schedule: Schedule = Listed(self.full, self.steps) if self.full else Cycle(self.interval, self.warmup)
        predictor = Lagrange(self.order) if self.order else Hold()
        rule = BranchRule(predictor=predictor, selector=self._selector(), margin=self.margin, attention=self.attention)
        return Policy(schedule, (rule,))

    def _selector(self) -> BranchSelector:
        if self.select == "none":
            return Unmatched()
        if self.select == "score":
            return ScoreThreshold(tau0=self.tau0)
        return Budget(share=self.share, by="score" if self.select == "score_budget" else "error")
