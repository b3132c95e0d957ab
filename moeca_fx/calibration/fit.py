"""Least squares for a handful of scalars, and the terms they weigh."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeca_fx.ops import forecast

# Ridge relative to the unit diagonal of the normalised Gram matrix: only directions without data feel it.
RIDGE = 1e-8


def terms(history: Sequence[tuple[Tensor, Tensor]], state: Tensor, order: int, inputs: bool) -> list[Tensor]:
    """What a forecast sums, in the layout of `Calibration.weights`.

    Args:
        history: (output, input) at the full steps so far, the last first; at least one.
        state: the current input.

    Returns:
        As many tensors as there are weights a step; zeros stand for full steps that do not exist yet.
    """
    nothing = torch.zeros_like(history[0][0])
    known = list(history[: order + 1])
    missing = [nothing] * (order + 1 - len(known))
    outputs = [output for output, _ in known] + missing
    if not inputs:
        return outputs
    return [*outputs, widen(state, nothing), *(widen(old, nothing) for _, old in known), *missing]


def widen(state: Tensor, like: Tensor) -> Tensor:
    """`state` with zero channels appended until it is shaped as the output `like` (a model with learned variances)."""
    return forecast.widen(state, like.shape[1])


def hold(count: int) -> Tensor:
    """The weights (1, 0, 0, ...): the last full step's output. What a fit without data falls back to."""
    prior = torch.zeros(count, dtype=torch.float64)
    prior[0] = 1.0
    return prior


def least_squares(rows: Tensor, target: Tensor, prior: Tensor, ridge: float = RIDGE) -> Tensor:
    """Weights w that minimise ``|rows w - target|^2``, pulled towards `prior` where the rows say nothing.

    Args:
        rows: [..., N, R] one row vector a term.
        target: [..., R].
        prior: [N].
        ridge: relative to each term's own size.

    Returns:
        [..., N], float64.
    """
    rows, target, prior = rows.double(), target.double(), prior.to(rows.device)
    size = rows.norm(dim=-1)  # [..., N]
    size = torch.where(size > 0, size, 1.0)
    unit = rows / size.unsqueeze(-1)
    left = target - torch.einsum("...nr,n->...r", rows, prior)
    gram = unit @ unit.transpose(-1, -2) + ridge * torch.eye(rows.shape[-2], dtype=torch.float64, device=rows.device)
    change: Tensor = torch.linalg.solve(gram, torch.einsum("...nr,...r->...n", unit, left))
    return prior + change / size
