"""Fit a forecast's weights along the trajectory that they themselves produce, and put the parts together."""

from typing import Any

import torch
from torch import Tensor

from moeca_fx.calibration.calibration import Calibration, terms_of
from moeca_fx.calibration.fit import RIDGE, hold, least_squares, terms, widen
from moeca_fx.calibration.law import Law, find_law
from moeca_fx.calibration.metric import Metric, state_metric
from moeca_fx.calibration.record import Model, OneCallAStep, Recording, Sampler, first_output, with_first
from moeca_fx.calibration.replay import weighted_sum
from moeca_fx.calibration.schedule_search import best_schedule, gap_costs, longest_gap


@torch.no_grad()
def fit_weights(
    recording: Recording,
    sampler: Sampler,
    model: Model,
    full: tuple[int, ...],
    *,
    law: Law,
    metric: Metric,
    order: int = 1,
    inputs: bool = True,
    ridge: float = RIDGE,
) -> Calibration:
    """Run the cached sampler once; at each skipped step fit the weights that lead to the recorded *next* state.

    With the sampler's law ``x_{j+1} = keep x_j + push v_j + noise``, the output that leads from the cached state x to
    the recorded next state is ``v_ref + keep/push (x_ref - x)``: errors made before are corrected as far as the terms
    allow. A step without a law aims at the recorded output.

    Args:
        recording: of the same sampler with the unmodified model.
        full: steps at which the model runs.
        metric: in which the next state's error is small.
    """
    fitter = _Fitter(recording, model, frozenset(full), law, metric, order, inputs, ridge)
    sampler(fitter)
    return Calibration(recording.steps, tuple(full), fitter.weights, order, inputs)


class _Fitter(OneCallAStep):
    """A model that runs at full steps and fits and applies weights at the others."""

    def __init__(
        self,
        recording: Recording,
        model: Model,
        full: frozenset[int],
        law: Law,
        metric: Metric,
        order: int,
        inputs: bool,
        ridge: float,
    ) -> None:
        self.recording, self.model, self.full, self.law, self.metric = recording, model, full, law, metric
        self.order, self.inputs, self.ridge = order, inputs, ridge
        self.weights: dict[int, tuple[float, ...]] = {}
        self.history: list[tuple[Tensor, Tensor]] = []
        self.step = 0
        super().__init__(self._next)

    def _next(self, state: Tensor, *rest: Any, **named: Any) -> Any:
        step, self.step = self.step, self.step + 1
        if step in self.full:
            answer = self.model(state, *rest, **named)
            self.history = [(first_output(answer), state.clone()), *self.history[: self.order]]
            return answer
        summed = terms(self.history, state, self.order, self.inputs)
        push = self.law.push[step]
        feedback = self.law.keep[step] / push if push else 0.0
        behind = widen(self.recording.inputs[step] - state, summed[0])
        target = self.recording.outputs[step] + feedback * behind
        channels = state.shape[1]
        stacked = torch.stack([term[:, :channels].flatten(1) for term in summed])  # [N, B, K]
        weights = least_squares(
            self.metric.rows(stacked, step + 1),
            self.metric.rows(target[:, :channels].flatten(1), step + 1),
            hold(terms_of(self.order, self.inputs)),
            self.ridge,
        )
        self.weights[step] = tuple(float(weight) for weight in weights)
        return with_first(self.recording.answer, weighted_sum(self.weights[step], summed))


def calibrate(
    recording: Recording,
    sampler: Sampler,
    model: Model,
    full_steps: int,
    *,
    law: Law | None = None,
    metric: Metric | None = None,
    costs: Tensor | None = None,
    order: int = 1,
    inputs: bool = True,
    ridge: float = RIDGE,
) -> Calibration:
    """Schedule by dynamic programming, then weights along the cached trajectory.

    Args:
        recording: one uncached run of `sampler` on `model`.
        full_steps: how many steps may run the model.
        law, metric, costs: of this recording, where they are known already (they serve every `full_steps`).
        order: full steps before the last one that a forecast uses; the schedule assumes 1.
        inputs: whether a forecast sums over inputs too.
    """
    law = find_law(sampler, recording) if law is None else law
    metric = state_metric(recording.steps) if metric is None else metric
    if costs is None:
        costs = gap_costs(recording, law, metric, inputs, longest_gap(recording.steps, full_steps), ridge)
    full = best_schedule(costs, full_steps)
    return fit_weights(recording, sampler, model, full, law=law, metric=metric, order=order, inputs=inputs, ridge=ridge)
