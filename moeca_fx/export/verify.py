"""Run an artefact and the transformed model side by side over a short trajectory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.export.step import ExportStep
from moeca_fx.runtime.module import TransformedModel

if TYPE_CHECKING:
    from moeca_fx.export.runner import ExportedModel

STEPS = 6
TOLERANCE = 1e-4
"""Largest difference over the largest value, fp32."""

_SPEED = 0.02  # how far inputs move between steps, of their own scale
_TIES = 0.01  # share of the branches that may be decided differently: scores that equal the threshold up to rounding


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        error: largest difference of a result over its largest value.
        decided: largest share of branches that one of the two recomputed and the other did not, as far as counts tell.
        steps: how many were compared.
    """

    error: float
    decided: float
    steps: int

    @property
    def passed(self) -> bool:
        """Whether both are within bounds."""
        return self.error <= TOLERANCE and self.decided <= _TIES

    def __str__(self) -> str:
        return f"results by {self.error:.1e}, decisions by {self.decided:.2%} in {self.steps} steps"


def verify(
    artefact: "ExportedModel", fast: TransformedModel, step: ExportStep, sizes: tuple[int, int, int]
) -> Verification:
    """Compare results and counts over `STEPS` steps at the smallest and the largest batch."""
    structure = pytree.tree_structure((step.program.traced.args, step.program.traced.kwargs))
    error = decided = 0.0
    steps = 0
    for batch in sorted({sizes[0], min(sizes[2], max(sizes[0], 5))}):
        for model in (artefact, fast):
            model.reset()
            model.reset_stats()
        for inputs in _trajectory(step, batch):
            args, kwargs = pytree.tree_unflatten(inputs, structure)
            found, expected = artefact(*args, **kwargs), fast(*args, **kwargs)
            error = max(error, _difference(found, expected))
            steps += 1
        decided = max(decided, _decided(artefact, fast))
    fast.reset()
    fast.reset_stats()
    return Verification(error, decided, steps)


def _trajectory(step: ExportStep, batch: int) -> list[list[Any]]:
    """Flat inputs of each step: floats drift at a speed of their own, the timestep advances, the rest stays."""
    generator = torch.Generator().manual_seed(0)
    start = step.examples(batch)[: len(step.inputs)]
    names = list(step.inputs)
    clock = names.index(step.timestep) if step.timestep is not None else None
    made = []
    for number in range(STEPS):
        leaves: list[Any] = []
        for index, value in enumerate(start):
            moved = value
            if value.is_floating_point():
                if index == clock:
                    moved = value + number * _SPEED
                elif value.dim() > 1:
                    noise = torch.randn(value.shape, generator=generator).to(value)
                    moved = value + number * _SPEED * noise
            leaves.append(moved)
        made.append(step.with_constants(leaves))
    return made


def _difference(found: Any, expected: Any) -> float:
    worst = 0.0
    for have, want in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(want, Tensor):
            worst = max(worst, float((have - want).abs().max() / want.abs().max().clamp_min(1e-12)))
    return worst


def _decided(artefact: "ExportedModel", fast: TransformedModel) -> float:
    """The largest difference in recomputed branches of a site, over its branches."""
    pairs = zip(artefact.stats().sites, fast.stats().sites, strict=True)
    return max((abs(a.recomputed - b.recomputed) / max(b.branches, 1) for a, b in pairs), default=0.0)
