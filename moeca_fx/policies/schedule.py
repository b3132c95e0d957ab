"""When: which steps of a trajectory are full, and which rule the others follow. Decided on the host."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from moeca_fx.errors import ConfigError
from moeca_fx.policies.checks import check_integer

# A full step; other steps name a rule of the policy by its position.
FULL = -1


@dataclass(frozen=True)
class Probe:
    """What is computed at the beginning of every step for a schedule that looks at the model.

    Attributes:
        what: ``"modulated_input"``, what the first block's attention reads after adaLN; or ``"first_blocks"``, what the
            first `blocks` blocks add to the token stream.
        blocks: how many blocks ``"first_blocks"`` runs; the rest of the step continues from there.
        against: whether the change is measured against the value of the last step or of the last full step.
        epsilon: added to the denominator of the relative change ``mean|m - m0| / (mean|m0| + epsilon)``.
    """

    what: Literal["modulated_input", "first_blocks"]
    blocks: int = 0
    against: Literal["last_step", "last_full_step"] = "last_step"
    epsilon: float = 0.0


class Schedule(ABC):
    """Chooses, step by step, between a full step and the rules of a policy.

    A schedule keeps no state itself: what it must remember of a trajectory goes through `choose`.
    """

    @property
    def probe(self) -> Probe | None:
        """What the choice needs to know from the model; None when the step's index is enough."""
        return None

    @abstractmethod
    def choose(self, step: int, change: float, memory: Any) -> tuple[int, Any]:
        """Choose for step `step` (0 is the trajectory's first, which is full whatever is returned).

        Args:
            change: relative change that the probe measured; NaN without a probe and at step 0.
            memory: what the previous call returned; None at step 0.

        Returns:
            `FULL` or the position of a rule, and what to remember.
        """

    @property
    def length(self) -> int | None:
        """Steps of the trajectories it was made for; None when it serves any."""
        return None

    @property
    @abstractmethod
    def settles(self) -> int:
        """Steps after which something should have been reused; a trajectory without any is then worth a warning."""


@dataclass(frozen=True)
class Cycle(Schedule):
    """Full at the first `warmup` steps, then at every `interval`-th after the last of them; rule 0 otherwise.

    With one warm-up step: ``step % interval == 0`` (FORA, MoECa). With two: 0, 1, 1 + N, 1 + 2N, ... (TaylorSeer).
    """

    interval: int
    warmup: int = 1

    def __post_init__(self) -> None:
        check_integer(self, "interval", 1)
        check_integer(self, "warmup", 1)

    def choose(self, step: int, change: float, memory: Any) -> tuple[int, Any]:
        """See `Schedule.choose`."""
        since = step - (self.warmup - 1)
        return (FULL if since <= 0 or since % self.interval == 0 else 0), memory

    @property
    def settles(self) -> int:
        """The warm-up and a whole cycle."""
        return self.warmup - 1 + self.interval


@dataclass(frozen=True)
class Listed(Schedule):
    """Full at the listed steps and after `steps`, the length of the trajectory the list was made for; else rule 0."""

    full: tuple[int, ...]
    steps: int

    def __post_init__(self) -> None:
        check_integer(self, "steps", 1)
        integers = all(isinstance(step, int) and not isinstance(step, bool) for step in self.full)
        if not integers or list(self.full) != sorted(set(self.full)) or self.full[:1] != (0,):
            raise ConfigError(f"Listed.full: expected ascending step indices that begin with 0, found {self.full!r}")
        if self.full[-1] >= self.steps:
            raise ConfigError(f"Listed.full: expected steps below {self.steps}, found {self.full[-1]}")

    def choose(self, step: int, change: float, memory: Any) -> tuple[int, Any]:
        """See `Schedule.choose`."""
        return (FULL if step in self.full or step >= self.steps else 0), memory

    @property
    def length(self) -> int:
        """`steps`."""
        return self.steps

    @property
    def settles(self) -> int:
        """The first step that is full again after one that is not."""
        skipped = next((step for step in range(self.steps) if step not in self.full), self.steps)
        return next((step for step in self.full if step > skipped), self.steps)
