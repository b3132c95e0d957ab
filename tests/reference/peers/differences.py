"""TaylorSeer's finite differences of one tensor over the full steps (arXiv 2503.06923)."""

import math

from torch import Tensor


class Differences:
    """F_0 = Y; F_{i+1} = (F_i - F_i of the full step before) / (s - s_prev); forecast sum_i F_i (s - s_last)^i / i!.

    The orders grow with the full steps seen: after one only F_0 exists, after two F_1 too, up to `order`. Positions
    may count up or down: the formula is the same.

    Args:
        order: the highest difference kept.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.position = 0
        self.factors: list[Tensor] = []

    def update(self, position: int, value: Tensor) -> None:
        """A full step at `position` computed `value`."""
        factors = [value]
        for previous in self.factors[: self.order]:
            factors.append((factors[-1] - previous) / (position - self.position))
        self.position, self.factors = position, factors

    def predict(self, position: int) -> Tensor:
        """The value forecast for `position`."""
        distance = position - self.position
        total = self.factors[0]
        for i, factor in enumerate(self.factors[1:], start=1):
            total = total + factor * distance**i / math.factorial(i)
        return total
