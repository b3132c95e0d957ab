"""The promise, for one structure: transformed and proven equal with reuse shown, or refused for a documented reason."""

import time
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import MoecaError
from moeca_fx.runtime.advice import NothingReusedWarning
from moeca_fx.runtime.module import TransformedModel
from tests.structures.model import Call, build, call, inputs, trajectory
from tests.structures.reasons import reason_of
from tests.structures.structure import Structure

TOLERANCE = 1e-5
STEPS, BATCH = 4, 3
# Thresholds of the score that decides what is recomputed, from little reuse to much: the first one that reuses is used.
REUSING = tuple(MoECa(interval=4, tau0=tau0) for tau0 in (0.6, 1.2, 3.0, 12.0))
FULL = MoECa(interval=1)
# A cached step that recomputes everything: what it takes from its caches is nothing, so it equals the original too.
RECOMPUTING = MoECa(interval=4, tau0=0.0, attention="full", dense_ffn="full", shared_expert="full")

Verdict = Literal["transformed", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a structure.

    Attributes:
        verdict: ``failed`` is every broken promise.
        reason: code of the documented reason, or which check failed; empty when transformed.
        detail: the error's message, or numbers.
        seconds: of `transform` and of all checks.
        reused: share of the branches of cached steps that were reused.
    """

    verdict: Verdict
    reason: str = ""
    detail: str = ""
    seconds: tuple[float, float] = (0.0, 0.0)
    reused: float = 0.0


class Broken(AssertionError):
    """A check that does not hold: its name, and what was found."""

    def __init__(self, check: str, found: str) -> None:
        super().__init__(f"{check}: {found}")
        self.check, self.found = check, found


def examine(structure: Structure, seed: int = 0) -> Outcome:
    """Build, transform and check one structure."""
    model, *given = build(structure, seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = call(model, (given[0], given[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingReusedWarning)  # two of the policies reuse nothing, on purpose
            outcome = _transform_and_check(structure, model, seed, (given[0], given[1]))
        _check_untouched(model, before, expected, (given[0], given[1]))
    except Broken as broken:
        return Outcome("failed", broken.check, broken.found)
    except Exception as error:  # noqa: BLE001  # any other exception breaks the promise, whatever its type
        return Outcome("failed", f"crashed: {type(error).__name__}", str(error))
    return outcome


def _transform_and_check(structure: Structure, model: nn.Module, seed: int, given: Call) -> Outcome:
    start = time.perf_counter()
    try:
        fast = moeca_fx.transform(model, *given, policy=REUSING[0], compile=False)
    except MoecaError as error:
        reason = reason_of(error)
        if reason is None:
            return Outcome("failed", f"undocumented {type(error).__name__}", str(error))
        return Outcome("refused", reason, str(error), (time.perf_counter() - start, 0.0))
    took = time.perf_counter() - start
    reused = _check(structure, model, fast, seed)
    return Outcome("transformed", "", "", (took, time.perf_counter() - start), reused)


def _check(structure: Structure, model: nn.Module, fast: TransformedModel, seed: int) -> float:
    """Every check of a transformed model; returns the share of reused branches."""
    for batch in (1, BATCH):
        other = inputs(structure, batch, seed + 1, t=0.3)
        _equal(f"full step, new input, batch {batch}", call(fast, other), call(model, other))
    steps = trajectory(structure, BATCH, STEPS, seed + 2)
    expected = _run(model, steps)
    for name, policy, cached in (("forced full", FULL, 0), ("recomputing", RECOMPUTING, STEPS - 1)):
        other_policy = fast.with_policy(policy)
        for index, (found, want) in enumerate(zip(_run(other_policy, steps), expected, strict=True)):
            _equal(f"{name}, step {index}", found, want)
        if _cached_steps(other_policy) != cached:
            raise Broken(f"{name}, cached steps", str(_cached_steps(other_policy)))
    return _check_reuse(fast, steps, expected[0])


def _check_reuse(fast: TransformedModel, steps: list[Call], first: Tensor) -> float:
    """A cached trajectory reuses branches, saves operations, and is the same for a sample alone."""
    branches = recomputed = 0
    for policy in REUSING:
        fast = fast.with_policy(policy)
        found = _run(fast, steps)
        _equal("first step of a trajectory", found[0], first)
        branches, recomputed = _branches(fast)
        if recomputed < branches:
            break
    if _cached_steps(fast) != STEPS - 1 or recomputed >= branches:
        raise Broken("nothing was reused", f"{_cached_steps(fast)} cached steps, {recomputed} of {branches} recomputed")
    _check_samples_apart(fast, steps, found)
    return 1 - recomputed / branches


def _cached_steps(fast: TransformedModel) -> int:
    """As `stats().cached_steps`, which measures FLOPs too: seconds a model."""
    return fast._moeca.accounting.cached_calls


def _branches(fast: TransformedModel) -> tuple[int, int]:
    """Branches of cached steps, and those recomputed."""
    sites = [site for tally in fast._moeca.accounting.tallies.values() for site in tally.site_statistics()]
    return sum(site.branches for site in sites), sum(site.recomputed for site in sites)


def _check_samples_apart(fast: TransformedModel, steps: list[Call], together: list[Tensor]) -> None:
    """A sample alone takes the same cached trajectory as in its batch."""
    fast.reset()
    alone = _run(fast, [_one_sample(step, BATCH - 1) for step in steps])
    for index, (one, batch) in enumerate(zip(alone, together, strict=True)):
        _equal(f"a sample alone, step {index}", one, batch[BATCH - 1 :])


def _one_sample(step: Call, sample: int) -> Call:
    args, kwargs = step
    part = slice(sample, sample + 1)
    return tuple(value[part] for value in args), {name: value[part] for name, value in kwargs.items()}


def _check_untouched(model: nn.Module, before: dict[str, Tensor], expected: Tensor, given: Call) -> None:
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        raise Broken("the original's weights changed", ", ".join(changed))
    _equal("the original's output afterwards", call(model, given), expected)


def _run(model: nn.Module, steps: list[Call]) -> list[Tensor]:
    return [call(model, step).clone() for step in steps]


def _equal(check: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise Broken(check, f"{tuple(found.shape)} {found.dtype}, expected {tuple(expected.shape)} {expected.dtype}")
    error = float((found - expected).double().abs().max() / expected.double().abs().max())
    if not error <= TOLERANCE:
        raise Broken(check, f"differs by {error:.1e} relative, allowed {TOLERANCE:.0e}")
