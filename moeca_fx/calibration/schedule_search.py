"""Which steps to compute: dynamic programming over recorded trajectories (optimal step sizes by shortest path).

The error that a gap of skipped steps adds depends, to first order, on three full steps only: the last two before it
(what the forecast knows) and the one after it (how long it must last). So the best schedule is a shortest path over
pairs (previous full step, last full step), and the costs of all gaps come from one recording: the model does not run.
"""

import math

import torch
from torch import Tensor

from moeca_fx.calibration.fit import RIDGE, hold, least_squares
from moeca_fx.calibration.law import Law
from moeca_fx.calibration.metric import Metric
from moeca_fx.calibration.record import Recording
from moeca_fx.errors import InputError

# Gaps longer than this many times the average are not considered.
LONGEST = 4.0
# Values of a state that the search looks at, in whole samples: more would cost time and not change the schedule.
VALUES = 16384


def longest_gap(steps: int, full_steps: int) -> int:
    """The longest distance between full steps worth considering."""
    return min(steps, max(3, math.ceil(LONGEST * steps / full_steps)))


@torch.no_grad()
def gap_costs(recording: Recording, law: Law, metric: Metric, inputs: bool, reach: int, ridge: float = RIDGE) -> Tensor:
    """Cost of every gap: its forecasts are fitted as `fit_weights` does, but on the recorded states.

    Starting from the recorded state after full step c, each skipped step takes the best weights of (outputs and inputs
    at c and p, current state); the cost is the metric of the state's error when the next full step n begins.

    Only the first samples take part, `VALUES` values of them.

    Args:
        reach: longest distance between neighbouring full steps.

    Returns:
        [S, reach + 1, reach + 1], indexed by c, c - p (0: there is no p, c is step 0), n - c; infinite where there is
        no such gap. ``n = S`` is the end of the trajectory.
    """
    steps = recording.steps
    samples = max(1, VALUES // recording.states.shape[2])
    states, outputs = recording.states[:, :samples], recording.velocities[:, :samples]
    metric = metric.of(samples)
    costs = torch.full((steps, reach + 1, reach + 1), math.inf, dtype=torch.float64)
    for last in range(steps):
        before = torch.arange(last - 1, max(last - reach, 0) - 1, -1) if last else torch.tensor([0])
        known = last > 0
        old_output = outputs[before] if known else torch.zeros_like(outputs[before])  # [Q, B, K]
        old_state = states[before] if known else torch.zeros_like(old_output)
        places = last - before if known else torch.tensor([0])
        error = torch.zeros_like(old_output)  # of the state, [Q, B, K]
        costs[last, places, 1] = 0.0
        for step in range(last + 1, min(last + reach, steps)):
            now = states[step] + error
            here = outputs[last].expand_as(error)
            summed = [here, old_output]
            if inputs:
                summed += [now, states[last].expand_as(error), old_state]
            stacked = torch.stack(summed, 1)  # [Q, N, B, K]
            feedback = law.keep[step] / law.push[step] if law.push[step] else 0.0
            target = outputs[step] - feedback * error
            weights = least_squares(
                metric.rows(stacked, step + 1), metric.rows(target, step + 1), hold(len(summed)), ridge
            )
            forecast = torch.einsum("qn,qnbk->qbk", weights.to(stacked), stacked)
            # Without a law of the sampler, errors of the outputs add up as they are.
            push = law.push[step] or 1.0 / steps
            error = law.keep[step] * error + push * (forecast - outputs[step])
            costs[last, places, step + 1 - last] = metric.rows(error, step + 1).pow(2).sum(-1).cpu()
    return costs


def best_schedule(costs: Tensor, full_steps: int) -> tuple[int, ...]:
    """The `full_steps` steps with the least total cost; step 0 is among them.

    Args:
        costs: as `gap_costs` returns them.

    Raises:
        InputError: no schedule of that many steps exists within the reach of `costs`.
    """
    steps, width, _ = costs.shape
    reach = width - 1
    if not 1 <= full_steps <= steps:
        raise InputError(f"best_schedule: expected between 1 and {steps} full steps, found {full_steps}")
    best = torch.full((steps, width), math.inf, dtype=torch.float64)  # by last full step and distance to the previous
    best[0, 0] = 0.0
    choices: list[Tensor] = []
    for _ in range(full_steps - 1):
        longer = torch.full_like(best, math.inf)
        choice = torch.zeros(steps, width, dtype=torch.int64)
        for gap in range(1, min(reach, steps - 1) + 1):
            total = best[: steps - gap] + costs[: steps - gap, :, gap]
            longer[gap:, gap], choice[gap:, gap] = total.min(1)
        choices.append(choice)
        best = longer
    ends = torch.full_like(best, math.inf)
    for last in range(max(0, steps - reach), steps):
        ends[last] = best[last] + costs[last, :, steps - last]
    if not bool(torch.isfinite(ends).any()):
        raise InputError(
            f"best_schedule: {full_steps} full steps at most {reach} apart do not reach over {steps} steps; "
            "compute costs with a longer reach"
        )
    last, gap = divmod(int(ends.argmin()), width)
    found = [last]
    for choice in reversed(choices):
        previous_gap = int(choice[last, gap])
        last, gap = last - gap, previous_gap
        found.append(last)
    return tuple(reversed(found))
