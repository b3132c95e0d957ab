"""Calibrated output forecasts: full steps where they matter, weights fitted to an uncached calibration run.

Made by `moeca_fx.tune`; `moeca_fx.calibration` says how schedule and weights are found.
"""

from dataclasses import dataclass
from typing import ClassVar

from moeca_fx.errors import ConfigError
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.predictor import Fitted
from moeca_fx.policies.rules import OutputRule
from moeca_fx.policies.schedule import Listed


@dataclass(frozen=True)
class Calibrated(Method):
    """For one model, one sampler and one number of steps.

    Args:
        steps: length of the trajectory that it was calibrated for.
        full: indices of the full steps; the first is 0.
        weights: (step, weights) for every other step: of the outputs at the last full steps, the last one first, then,
            with `inputs`, of the current input and of the inputs at those full steps.
        inputs: whether forecasts sum over inputs too.
        sampler: name of the sampler it was calibrated with, for the reader.
    """

    method: ClassVar[str] = "calibrated"

    steps: int
    full: tuple[int, ...]
    weights: tuple[tuple[int, tuple[float, ...]], ...]
    inputs: bool = False
    sampler: str = ""

    def _check(self) -> None:
        if not self.weights:
            raise ConfigError("Calibrated.weights: expected (step, weights) pairs, found none; tune the policy again")
        skipped = set(range(self.steps)) - set(self.full)
        if {step for step, _ in self.weights} != skipped:
            raise ConfigError(
                f"Calibrated.weights: expected an entry for each of the {len(skipped)} steps that are not full, found "
                f"{len(self.weights)}; calibrate with moeca_fx.tune"
            )

    def policy(self) -> Policy:
        """Listed full steps, fitted forecasts of the output."""
        rule = OutputRule(predictor=Fitted(self.weights), inputs=self.inputs)
        return Policy(Listed(self.full, self.steps), (rule,))
