"""Forecasting the model's output: no cache inside the network at all."""

from typing import Any

from torch import Tensor

from tests.reference.peers.base import FULL, Reference, item0
from tests.reference.peers.differences import Differences
from tests.reference.peers.schedules import is_full


class Forecast(Reference):
    """Full steps run the model; the others forecast its prediction by TaylorSeer's formula. Nothing of x, t, y is read.

    Args:
        model: the model.
        order: of the forecast; 0 holds the last prediction.
        interval: N, see `schedules.is_full`.
        warmup: number of first steps that are full; by default 2 for order >= 1 and 1 for order 0.
    """

    def __init__(self, model: Any, order: int = 1, interval: int = 4, warmup: int | None = None) -> None:
        super().__init__(model)
        self.interval = interval
        self.warmup = warmup if warmup is not None else (2 if order >= 1 else 1)
        self.differences = Differences(order)

    def step(self, j: int, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, str]:
        if is_full(j, self.interval, self.warmup):
            prediction = item0(self.model(x, t, y))
            self.differences.update(j, prediction)
            return prediction, FULL
        return self.differences.predict(j), "forecast"
