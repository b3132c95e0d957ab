"""The result of a calibration: full steps, and the weights that stand for the others."""

import math
from dataclasses import dataclass

from moeca_fx.errors import ConfigError


@dataclass(frozen=True)
class Calibration:
    """An output-level forecast with fitted weights, for trajectories of `steps` steps.

    Attributes:
        steps: length S of the trajectory it was made for.
        full: steps at which the model runs; ascending, begins with 0.
        weights: for every other step, weights of: the outputs at the last `order` + 1 full steps, the last first; then,
            with `inputs`, the current input and the inputs at those full steps. Zero where there is no such step yet.
        order: how many full steps before the last one are used.
        inputs: whether inputs are summed over too.
    """

    steps: int
    full: tuple[int, ...]
    weights: dict[int, tuple[float, ...]]
    order: int
    inputs: bool

    def __post_init__(self) -> None:
        if self.order < 0:
            raise ConfigError(f"Calibration.order: expected an integer >= 0, found {self.order}")
        if list(self.full) != sorted(set(self.full)) or self.full[:1] != (0,) or self.full[-1] >= self.steps:
            raise ConfigError(
                f"Calibration.full: expected ascending steps from 0 to below {self.steps}, found {self.full}"
            )
        skipped = sorted(set(range(self.steps)) - set(self.full))
        if sorted(self.weights) != skipped:
            wrong = sorted(set(self.weights) ^ set(skipped))
            raise ConfigError(
                f"Calibration.weights: expected weights for exactly the steps that are not full; wrong at {wrong}"
            )
        for step, weights in self.weights.items():
            if len(weights) != self.terms or not all(math.isfinite(weight) for weight in weights):
                raise ConfigError(
                    f"Calibration.weights: expected {self.terms} finite numbers at step {step}, found {weights}"
                )

    @property
    def terms(self) -> int:
        """Weights a step."""
        return terms_of(self.order, self.inputs)


def terms_of(order: int, inputs: bool) -> int:
    """Weights a step: `order` + 1 outputs, and with `inputs` the current input and as many inputs."""
    return 2 * (order + 1) + 1 if inputs else order + 1
