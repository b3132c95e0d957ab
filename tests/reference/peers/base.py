"""What every reference has in common: it is called like the model and counts its own steps."""

import math
from typing import Any

import torch
from torch import Tensor

FULL = "full"


class Reference:
    """A model under a policy, one call for each denoising step of one trajectory.

    Args:
        model: a `DSMoE`, a `DiTMoE` or a toy of the same layout, in evaluation mode; it is only read.

    Attributes:
        kinds: what every step so far was: "full" or the name of the rule that served it.
        margin: how close the closest decision so far came to a tie, in units of what was compared; infinite when
            nothing was compared. A product that computes in other precision may decide otherwise near 0.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kinds: list[str] = []
        self.margin = math.inf

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """One step: x [B, C, S, S], t [B], y [B] -> the prediction [B, C', S, S] (item 0 of the model's result)."""
        with torch.no_grad():
            prediction, kind = self.step(len(self.kinds), x, t, y)
        self.kinds.append(kind)
        return prediction

    def step(self, j: int, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, str]:
        """Step `j`, counted from 0: its prediction and its kind."""
        raise NotImplementedError

    def decided(self, distance: float) -> None:
        """Record how far a decision was from a tie."""
        self.margin = min(self.margin, distance)


def item0(result: object) -> Tensor:
    """The prediction in a model's result: the result, or item 0 of it."""
    prediction = result[0] if isinstance(result, tuple) else result
    assert isinstance(prediction, Tensor)
    return prediction
