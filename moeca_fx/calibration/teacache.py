"""TeaCache's calibration: a polynomial from the change of the first modulated input to the change of the output."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moeca_fx.calibration.record import Recording
from moeca_fx.errors import InputError
from moeca_fx.policies.methods.teacache import TeaCache
from moeca_fx.transform import transform

DEGREE = 4
EPSILON = 1e-6


@torch.no_grad()
def fit_teacache(model: nn.Module, recording: Recording, degree: int = DEGREE) -> tuple[float, ...]:
    """Least squares over the steps of an uncached run (arXiv 2411.19108, section 3.3).

    Args:
        model: the unmodified model.
        recording: one uncached run of it.
        degree: of the polynomial; the original's is 4.

    Returns:
        Coefficients, the highest power first, for `TeaCache`.

    Raises:
        InputError: fewer steps than coefficients need.
    """
    if recording.steps < degree + 2:
        raise InputError(
            f"fit_teacache: expected a run of at least {degree + 2} steps for degree {degree}, found {recording.steps}"
        )
    changes = input_changes(model, recording)
    outputs = recording.outputs.float()
    moved = (outputs[1:] - outputs[:-1]).abs().flatten(1).mean(1) / (outputs[:-1].abs().flatten(1).mean(1) + EPSILON)
    powers = changes.double()[:, None] ** torch.arange(degree, -1, -1, device=changes.device)
    found = torch.linalg.lstsq(powers, moved.double()[:, None]).solution.flatten()
    return tuple(float(value) for value in found)


@torch.no_grad()
def input_changes(model: nn.Module, recording: Recording) -> torch.Tensor:
    """Relative change of the first modulated input at every step but the first, [S - 1]."""
    fast = None
    before, changes = None, []
    for state, (rest, named) in zip(recording.inputs, recording.arguments, strict=True):
        args: tuple[Any, ...] = (state, *rest)
        kwargs: Mapping[str, Any] = named
        if fast is None:
            fast = transform(model, args, kwargs, policy=TeaCache(steps=recording.steps), compile=False)
        graphs = fast._moeca.prepare(fast, args, kwargs).graphs
        assert graphs is not None and graphs.probe is not None, "TeaCache looks at the model"
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        held = before if before is not None else state.new_zeros(state.shape[0], *graphs.probe.state.shape)
        change, value = graphs.probe.module(*leaves, held)
        if before is not None:
            changes.append(change)
        before = value.clone()
    return torch.stack(changes)
