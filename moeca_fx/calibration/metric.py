"""What an error of the state costs: by itself, or by what it does to the final image.

A stochastic sampler wipes out an error that looks like noise and keeps one that looks like image; a plain least-squares
fit in state space spends its scalars on the former. `image_metric` measures errors where they count: it carries random
directions of the final image back to every step (the adjoint of the recorded trajectory), so that
``probe . dx_S = adjoint_j . dx_j`` to first order.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeca_fx.calibration.law import Law
from moeca_fx.calibration.record import Model, Recording, first_output

# Weight of the plain error beside the projected one: keeps a fit from few directions well posed.
PLAIN_SHARE = 0.1
# The adjoint is carried in at most this many strides; within one, the output counts as held.
STRIDES = 50


@dataclass(frozen=True)
class Metric:
    """Turns errors of the state before step j into rows whose sum of squares is the cost.

    Attributes:
        adjoints: [S + 1, P, B, K], or None for the plain error times `gains[j]`.
        gains: per step 0..S.
        plain_share: weight of the plain error's rows beside the projected ones.
    """

    adjoints: Tensor | None
    gains: tuple[float, ...]
    plain_share: float = PLAIN_SHARE

    def rows(self, error: Tensor, step: int) -> Tensor:
        """Rows [..., R] of errors [..., B, K] of the state before step `step` (S: the final image), in float64."""
        error = error.double()
        plain = self.gains[step] * error.flatten(-2)
        if self.adjoints is None:
            return plain
        adjoint = self.adjoints[step].double()  # [P, B, K]
        projected = torch.einsum("...bk,pbk->...pb", error, adjoint).flatten(-2) / adjoint.shape[0] ** 0.5
        return torch.cat([projected, self.plain_share**0.5 * plain], -1)

    def of(self, samples: int) -> "Metric":
        """The same for the first samples alone."""
        return self if self.adjoints is None else replace(self, adjoints=self.adjoints[:, :, :samples])


def state_metric(steps: int) -> Metric:
    """Every error counts by its own size."""
    return Metric(None, (1.0,) * (steps + 1))


def image_metric(recording: Recording, law: Law, model: Model, probes: int = 4, seed: int = 0) -> Metric:
    """Errors count by what they do to the final image.

    Args:
        model: the unmodified model; it is differentiated with respect to its input, once a stride and probe.
        probes: random directions of the final image a sample.
        seed: of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    final = recording.inputs[0]
    carried = torch.randn(probes, *final.shape, generator=generator).to(final)  # [P, B, C, ...]
    adjoints: list[Tensor] = [carried.flatten(2)]
    stride = max(1, round(recording.steps / STRIDES))
    stop = recording.steps
    while stop > 0:
        start = max(0, stop - stride)
        pulled = _pull_back(recording, model, start, carried)
        # Within the stride the output is held: each step back adds its own push of the same pulled-back direction.
        for step in reversed(range(start, stop)):
            carried = law.keep[step] * carried + law.push[step] * pulled
            adjoints.append(carried.flatten(2))
        stop = start
    stacked = torch.stack(adjoints[::-1])  # [S + 1, P, B, K]
    gains = tuple(float(a) for a in stacked.double().pow(2).mean((1, 2, 3)).sqrt())
    return Metric(stacked, gains)


def _pull_back(recording: Recording, model: Model, step: int, directions: Tensor) -> Tensor:
    """``J^T directions`` [P, B, C, ...] with J the model's Jacobian at the recorded state of `step`."""
    rest, named = recording.arguments[step]
    channels = recording.inputs.shape[2]
    with torch.enable_grad():
        state = recording.inputs[step].clone().requires_grad_(True)
        output = first_output(model(state, *rest, **named))[:, :channels]
        pulled = [
            torch.autograd.grad(output, state, direction, retain_graph=index + 1 < len(directions))[0]
            for index, direction in enumerate(directions)
        ]
    return torch.stack(pulled)
