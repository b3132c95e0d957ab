"""Run an artefact and the transformed model side by side over a short trajectory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.export.plan import ExportPlan
from moeca_fx.runtime.module import TransformedModel

if TYPE_CHECKING:
    from moeca_fx.export.runner import ExportedModel

STEPS = 6


@dataclass(frozen=True)
class Bounds:
    """What an artefact may differ by.

    Attributes:
        error: largest difference of a sample's result over the largest value.
        tied: most tokens of a site that may hold other experts.
    """

    error: float
    tied: float


FP32 = Bounds(1e-4, 0.02)
BOUNDS = {torch.float16: Bounds(1e-2, 0.1), torch.bfloat16: Bounds(5e-2, 0.3)}
"""Of dtypes with fewer bits: rounding moves every token a little, and in every sample some over a threshold."""

_SPEED = 0.02  # how far inputs move between steps, of their own scale
_NOISE = 1e-5  # norms of features that the same computation gave in two libraries differ by less
_AGREEING = 0.5  # fewest samples, of all steps, without a tie


@dataclass(frozen=True)
class Verification:
    """What was found, sample by sample and step by step.

    Where two experts, or a score and its threshold, are equal up to rounding, another library may decide differently: a
    tie. From there on the sample differs until the next full step, so it is counted, not compared. Where no norms of
    features are kept, or they have fewer bits than fp32, nothing tells a tie, and what is far off counts as one.

    Attributes:
        error: largest difference over the largest value, of samples without a tie.
        tied: largest share of a site's tokens that hold other experts.
        agreeing: share of the samples, of all steps, without a tie.
        steps: how many steps were compared.
        bounds: what was allowed.
    """

    error: float
    tied: float
    agreeing: float
    steps: int
    bounds: Bounds = FP32

    @property
    def passed(self) -> bool:
        """Whether all are within bounds."""
        return self.error <= self.bounds.error and self.tied <= self.bounds.tied and self.agreeing >= _AGREEING

    def __str__(self) -> str:
        return (
            f"results by {self.error:.1e}, experts of {self.tied:.2%} of a site's tokens; {self.agreeing:.0%} of the "
            f"samples of {self.steps} steps agree"
        )


def verify(
    artefact: "ExportedModel",
    fast: TransformedModel,
    plan: ExportPlan,
    sizes: tuple[int, int, int],
    *,
    batches: Sequence[int] = (),
    steps: int = STEPS,
) -> Verification:
    """Compare results step by step; statistics of both are those of the last batch afterwards.

    Args:
        artefact, fast: on one device, where the tensors of `plan.inputs` lie.
        sizes: least, best and most samples of a call.
        batches: to compare at; none takes the smallest and a larger one.
    """
    structure = pytree.tree_structure((plan.program.traced.args, plan.program.traced.kwargs))
    errors, tied, agree = [], [0.0], []
    dtypes = {tensor.dtype for tensor in plan.program.traced.model.parameters()}
    bounds = max((BOUNDS.get(dtype, FP32) for dtype in dtypes), key=lambda bounds: bounds.error, default=FP32)
    slots = any(state.kind == "norm" for state in plan.states)
    told = slots and bounds == FP32
    batches = batches or sorted({sizes[0], min(sizes[2], max(sizes[0], 2))})
    for batch in batches:
        for model in (artefact, fast):
            model.reset()
            model.reset_stats()
        for inputs in trajectory(plan, batch, steps):
            args, kwargs = pytree.tree_unflatten(inputs, structure)
            difference = _differences(artefact(*args, **kwargs), fast(*args, **kwargs), batch)
            free = ~_disturbed(artefact, fast, batch) if told else difference <= bounds.error
            tied += _other_experts(artefact, fast) if slots else []
            errors += difference[free].tolist()
            agree += free.tolist()
    fast.reset()
    share = sum(agree) / len(agree)
    return Verification(max(errors, default=0.0), max(tied), share, steps * len(batches), bounds)


def _disturbed(artefact: "ExportedModel", fast: TransformedModel, batch: int) -> Tensor:
    """Samples [B] after a tie: norms of their features, summed over slots, differ by more than rounding."""
    found, expected = artefact.cache(), fast.cache()
    disturbed = torch.zeros(batch, dtype=torch.bool)
    for name in (name for name in expected if name.endswith(".norm")):
        have, want = found[name].sum(-1).cpu(), expected[name].sum(-1).cpu()
        disturbed |= ((have - want).abs() > _NOISE * want.abs().clamp_min(1e-6)).any(1)
    return disturbed


def _other_experts(artefact: "ExportedModel", fast: TransformedModel) -> list[float]:
    """For every MoE site the share of tokens that hold branches of other experts."""
    found, expected = artefact.cache(), fast.cache()
    pairs = [
        (found[name].sort(-1).values, expected[name].sort(-1).values) for name in expected if name.endswith(".expert")
    ]
    return [float((have != want).any(-1).float().mean()) for have, want in pairs]


def _differences(found: Any, expected: Any, batch: int) -> Tensor:
    """For each sample the largest difference over the largest value of a result, [B]."""
    worst = torch.zeros(batch)
    for have, want in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(want, Tensor):
            scale = want.abs().max().clamp_min(1e-12)
            worst = torch.maximum(worst, ((have - want).abs().reshape(batch, -1).amax(1) / scale).cpu())
    return worst


def trajectory(plan: ExportPlan, batch: int, steps: int) -> list[list[Any]]:
    """Flat inputs of every call: floats drift at a speed of their own, the timestep advances, the rest stays."""
    generator = torch.Generator().manual_seed(0)
    start = plan.call(batch)
    names = list(plan.inputs)
    clock = names.index(plan.timestep) if plan.timestep is not None else None
    made = []
    for number in range(steps):
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
        made.append(plan.with_constants(leaves))
    return made
