"""What: the value that stands for one that is not computed. Always a weighted sum of earlier computed values.

A value Y computed at the last O+1 full steps p_0 > p_1 > ... > p_O is forecast at step s as ``sum_i w_i(s) Y(p_i)``.
Holding, finite differences, polynomial extrapolation and fitted weights differ in w alone, and w depends on step
indices alone: the host computes it once a step for the whole network, the graph sums (`ops/forecast.py`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from moeca_fx.errors import ConfigError
from moeca_fx.policies.checks import check_integer

MAX_ORDER = 6


class Predictor(ABC):
    """Weights of a forecast."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """How many computed values a forecast sums: the order plus one. That many are kept in memory."""

    @abstractmethod
    def weights(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """One weight a term, zero where there is no such value yet.

        Args:
            step: index of the step to forecast.
            full: indices of the full steps so far, the last one first; at least one.
        """


@dataclass(frozen=True)
class Hold(Predictor):
    """The value of the last full step: order 0."""

    @property
    def terms(self) -> int:
        """One."""
        return 1

    def weights(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """Always (1,)."""
        return (1.0,)


@dataclass(frozen=True)
class Taylor(Predictor):
    """TaylorSeer's expansion (arXiv 2503.06923) with finite differences in place of derivatives.

    ``F_0 = Y``, ``F_{i+1} = (F_i - F_i before) / (p_0 - p_1)``, forecast ``sum_i F_i (s - p_0)^i / i!``. The order
    grows with the number of full steps so far, up to `order`.
    """

    order: int

    def __post_init__(self) -> None:
        check_integer(self, "order", 0, MAX_ORDER)

    @property
    def terms(self) -> int:
        """`order` + 1."""
        return self.order + 1

    def weights(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """See `Predictor.weights`."""
        count = min(self.terms, len(full))
        # factors[j]: F_i at full step p_j, as weights of the values.
        factors = [[float(i == j) for i in range(self.terms)] for j in range(count)]
        total = [0.0] * self.terms
        for order in range(count):
            scale = (step - full[0]) ** order / math.factorial(order)
            total = [t + scale * f for t, f in zip(total, factors[0], strict=True)]
            factors = [
                [(new - old) / (full[j] - full[j + 1]) for new, old in zip(factors[j], factors[j + 1], strict=True)]
                for j in range(len(factors) - 1)
            ]
        return tuple(total)


@dataclass(frozen=True)
class Lagrange(Predictor):
    """The polynomial through the last values, exact for polynomials of degree `order` at any spacing of full steps."""

    order: int

    def __post_init__(self) -> None:
        check_integer(self, "order", 0, MAX_ORDER)

    @property
    def terms(self) -> int:
        """`order` + 1."""
        return self.order + 1

    def weights(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """See `Predictor.weights`."""
        nodes = full[: self.terms]
        found = [math.prod((step - other) / (node - other) for other in nodes if other != node) for node in nodes]
        return (*found, *[0.0] * (self.terms - len(nodes)))


@dataclass(frozen=True)
class Fitted(Predictor):
    """Weights that were fitted to calibration trajectories, step by step.

    Args:
        table: (step, weights) pairs; all weights have the same length.
    """

    table: tuple[tuple[int, tuple[float, ...]], ...]

    def __post_init__(self) -> None:
        lengths = {len(weights) for _, weights in self.table}
        if len(lengths) != 1 or lengths == {0}:
            raise ConfigError(f"Fitted.table: expected weights of one length for every step, found {sorted(lengths)}")

    @property
    def terms(self) -> int:
        """Length of the weights."""
        return len(self.table[0][1])

    def weights(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """See `Predictor.weights`."""
        found = dict(self.table).get(step)
        if found is None:
            raise ConfigError(f"Fitted.table: expected weights for step {step}, found none; calibrate again")
        return found
