"""TeaCache (arXiv 2411.19108): skip all blocks while the accumulated change of the first modulated input is small."""

from dataclasses import dataclass
from typing import Any, ClassVar

from moeca_fx.errors import ConfigError
from moeca_fx.policies.checks import check_integer, check_number
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.rules import BlocksRule
from moeca_fx.policies.schedule import FULL, Probe, Schedule


@dataclass(frozen=True)
class AccumulatedChange(Schedule):
    """Full when changes since the last full step, each through a polynomial, add up to `threshold`; first and last too.

    Args:
        coefficients: of the polynomial, the highest power first.
    """

    threshold: float
    steps: int
    coefficients: tuple[float, ...]

    @property
    def probe(self) -> Probe:
        """The first block's modulated input, against the last step's."""
        return Probe("modulated_input", against="last_step", epsilon=1e-6)

    def choose(self, step: int, change: float, memory: Any) -> tuple[int, Any]:
        """See `Schedule.choose`; the memory is the accumulated change."""
        if step == 0 or step == self.steps - 1:
            return FULL, 0.0
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        total = memory + value
        return (0, total) if total < self.threshold else (FULL, 0.0)

    @property
    def length(self) -> int:
        """`steps`."""
        return self.steps

    @property
    def settles(self) -> int:
        """Half a trajectory."""
        return max(2, self.steps // 2)


@dataclass(frozen=True)
class TeaCache(Method):
    """One decision a batch, as in the original.

    Args:
        steps: length of the trajectory.
        threshold: larger skips more.
        coefficients: of the polynomial that maps input change to output change, the highest power first;
            `moeca_fx.calibration.fit_teacache` calibrates it, the default is the identity.
    """

    method: ClassVar[str] = "teacache"

    steps: int
    threshold: float = 0.1
    coefficients: tuple[float, ...] = (1.0, 0.0)

    def _check(self) -> None:
        check_integer(self, "steps", 1)
        check_number(self, "threshold")
        if not self.coefficients:
            raise ConfigError("TeaCache.coefficients: expected numbers, found none; pass some")

    def policy(self) -> Policy:
        """Accumulated change, the held residual of all blocks."""
        schedule = AccumulatedChange(self.threshold, self.steps, tuple(self.coefficients))
        return Policy(schedule, (BlocksRule(),))
