"""A calibrated forecast on the plain model: no graph, no cache, the definition itself.

What the compiled policy must agree with, and what searches run.
"""

from typing import Any

import torch
from torch import Tensor

from moeca_fx.calibration.calibration import Calibration
from moeca_fx.calibration.fit import terms
from moeca_fx.calibration.record import Model, OneCallAStep, first_output, with_first
from moeca_fx.errors import InputError


class Replay(OneCallAStep):
    """A model that runs at the full steps only; give it to a sampler in place of the model, for one trajectory.

    ``images = sampler(Replay(model, calibration))``
    """

    def __init__(self, model: Model, calibration: Calibration) -> None:
        self._model = model
        self._calibration = calibration
        self._full = frozenset(calibration.full)
        self._history: list[tuple[Tensor, Tensor]] = []
        self._last: Any = None
        self.step = 0
        super().__init__(self._next)

    @torch.no_grad()
    def _next(self, state: Tensor, *rest: Any, **named: Any) -> Any:
        """The model's answer, its (first) output computed or forecast.

        Raises:
            InputError: more calls than the calibration has steps.
        """
        step, found = self.step, self._calibration
        if step >= found.steps:
            raise InputError(
                f"Replay: the calibration is for {found.steps} steps, this is call {step + 1}; "
                "make a new Replay for every trajectory"
            )
        self.step += 1
        if step in self._full:
            self._last = self._model(state, *rest, **named)
            self._history = [(first_output(self._last), state.clone()), *self._history[: found.order]]
            return self._last
        summed = terms(self._history, state, found.order, found.inputs)
        return with_first(self._last, weighted_sum(found.weights[step], summed))


def weighted_sum(weights: tuple[float, ...], summed: list[Tensor]) -> Tensor:
    """``sum_i weights[i] summed[i]``."""
    total = weights[0] * summed[0]
    for weight, term in zip(weights[1:], summed[1:], strict=True):
        total = total + weight * term
    return total
