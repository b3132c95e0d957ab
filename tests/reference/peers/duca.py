"""DuCa: ToCa steps and steps that skip the whole network, in turn (arXiv 2412.18911)."""

from typing import Any

from torch import Tensor

from tests.reference.peers import network
from tests.reference.peers.base import FULL
from tests.reference.peers.schedules import steps_since_full
from tests.reference.peers.toca import ToCa


class DuCa(ToCa):
    """As ToCa, but by the number r of steps since the last full one: r odd is a ToCa step, r even (not 0) aggressive.

    An aggressive step puts the last hidden state - the output of the last block at the last step that was not
    aggressive - through the final layer with the current condition; it changes no cache. Fields as `ToCa`.
    """

    def __init__(
        self,
        model: Any,
        steps: int,
        interval: int = 4,
        fresh_ratio: float = 0.07,
        age_weight: float = 0.25,
        bonus: float = 0.8,
    ) -> None:
        super().__init__(model, steps, interval, fresh_ratio, age_weight, bonus)
        self.last_hidden: Tensor | None = None  # [B, T, H]

    def step(self, j: int, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, str]:
        self.begin(j)
        since = steps_since_full(self.schedule, j)
        if since > 0 and since % 2 == 0:
            assert self.last_hidden is not None, "a full step came before"
            condition = network.condition_of(self.model, t, y)
            return network.finish(self.model, self.last_hidden, condition), "aggressive"
        self.last_hidden, condition = self.hidden(x, t, y)
        return network.finish(self.model, self.last_hidden, condition), "toca" if since else FULL
