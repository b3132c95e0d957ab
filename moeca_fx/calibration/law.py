"""How a sampler turns an output into the next state, found by poking it - without running the model.

Nearly every one-step sampler is affine: ``x_{j+1} = keep_j x_j + push_j v_j + noise_j`` with two scalars a step (Euler,
DDIM, DDPM and their rectified-flow forms). Replaying the recorded outputs with small changes shows both scalars.
A sampler that clips, or that remembers earlier outputs, does not fit: its `push` is 0, which turns feedback off.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_fx.calibration.record import OneCallAStep, Recording, Sampler, with_first
from moeca_fx.errors import InputError

# A replay of the recorded outputs must give the recorded states up to this relative error.
SAME = 1e-5
# A step is affine when two scalars explain its response up to this relative error.
AFFINE = 1e-3


@dataclass(frozen=True)
class Law:
    """``x_{j+1} = keep[j] x_j + push[j] v_j + noise_j``; `push[j]` is 0 at a step that is not like that."""

    keep: tuple[float, ...]
    push: tuple[float, ...]

    @property
    def affine(self) -> bool:
        """Whether every step follows the law."""
        return all(push != 0.0 for push in self.push)


@torch.no_grad()
def find_law(sampler: Sampler, recording: Recording, seed: int = 0) -> Law:
    """Find the sampler's scalars by replaying changed outputs.

    Raises:
        InputError: the same outputs give other states: the sampler draws new noise at every call.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = recording.velocities.pow(2).mean().sqrt().item() or 1.0
    pokes = scale * torch.randn(recording.inputs.shape, generator=generator)  # [S, B, C, ...]
    pokes = pokes.to(recording.inputs)
    quiet = _replay(sampler, recording, torch.zeros_like(pokes))
    drift = (quiet[:-1] - recording.inputs).norm() / recording.inputs.norm()
    if not drift <= SAME:
        raise InputError(
            "calibration: the sampler did not repeat itself on the same outputs "
            f"(relative difference {float(drift):.2g}); make its random generator anew from a seed at every call"
        )
    poked = _replay(sampler, recording, pokes)
    moved = (poked - quiet).flatten(1).double()  # [S + 1, R]
    push_rows = pokes.flatten(1).double()  # [S, R]
    keep, push = [], []
    for step in range(recording.steps):
        terms = torch.stack([moved[step], push_rows[step]], 1)  # [R, 2]
        found = torch.linalg.pinv(terms) @ moved[step + 1]
        left = (terms @ found - moved[step + 1]).norm()
        fits = bool(left <= AFFINE * moved[step + 1].norm()) and bool(moved[step + 1].norm() > 0)
        keep.append(float(found[0]) if fits and step > 0 else 1.0)
        push.append(float(found[1]) if fits else 0.0)
    return Law(tuple(keep), tuple(push))


def _replay(sampler: Sampler, recording: Recording, pokes: Tensor) -> Tensor:
    """States [S + 1, B, ...] when the model answers as recorded plus `pokes`; the last is the final image."""
    states: list[Tensor] = []
    channels = recording.inputs.shape[2]

    def answering(state: Tensor, *rest: Any, **named: Any) -> Any:
        step = len(states)
        if step >= recording.steps:
            raise InputError(f"calibration: the sampler took {recording.steps} steps before and now takes more")
        states.append(state.detach().clone())
        answer = recording.outputs[step].clone()
        answer[:, :channels] += pokes[step]
        return with_first(recording.answer, answer)

    final = sampler(OneCallAStep(answering))
    if len(states) != recording.steps or final.shape != recording.inputs.shape[1:]:
        raise InputError(
            f"calibration: expected {recording.steps} steps to a state of shape {tuple(recording.inputs.shape[1:])}, "
            f"found {len(states)} steps to {tuple(final.shape)}"
        )
    return torch.stack([*states, final.detach()])
