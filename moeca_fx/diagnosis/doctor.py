"""`doctor`: run what `transform` runs, stage by stage, and tell where it stopped and why; the model stays as it is."""

import time
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.diagnosis.evidence import candidate_reports
from moeca_fx.diagnosis.report import DoctorReport
from moeca_fx.diagnosis.stages import Stages, Stopped
from moeca_fx.discover import Discovery
from moeca_fx.discover.journal import Attempt, Journal
from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.expert_stack import stack_experts
from moeca_fx.model_checks import check_inputs, check_model, resolve_policy
from moeca_fx.model_copy import share_weights
from moeca_fx.passes import PIPELINE, watched
from moeca_fx.policies import Method, MoECa, Policy
from moeca_fx.proven_regions import find_regions
from moeca_fx.runtime.advice import NothingReusedWarning
from moeca_fx.runtime.module import TransformedModel, make_transformed
from moeca_fx.runtime.options import memory_options
from moeca_fx.runtime.runtime import Runtime
from moeca_fx.runtime.timestep import Announced

_DEFAULT = MoECa()
_STEPS = 4
_PROOFS = ("method", "block", "entry")
_DISCOVERY = ("candidates", "probe", "second run", *(f"proof by {kind}" for kind in _PROOFS), "behaviour", "regions")
_PASSES = tuple(name for name, _ in PIPELINE)


def doctor(
    model: nn.Module,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | Policy | str | PathLike[str] = _DEFAULT,
    *,
    timestep: str | int | Announced | None = None,
    compile: bool = False,
) -> DoctorReport:
    """Diagnose a model: every stage with its time, every candidate with its evidence, what stopped, what to do.

    Args:
        model, example_inputs, example_kwargs, policy, timestep: as for `moeca_fx.transform`.
        compile: run the steps through `torch.compile` too, which takes tens of seconds.

    Returns:
        The report, whose `str` is its text. Whatever `transform` would raise is in it, as `error` and `code`.

    Raises:
        ConfigError: `policy` is none of these.
    """
    parts, kwargs = resolve_policy(policy), dict(example_kwargs or {})
    ends = ("rest of transform", "full step", "compiled steps" if compile else "cached steps")
    stages = Stages(("model checks", "inputs", *_DISCOVERY, *_PASSES, *ends))
    journal = Journal(near_misses=True)
    found: list[Discovery] = []
    try:
        with stages.stage("model checks"):
            check_model(model)
        with stages.stage("inputs"):
            check_inputs(model, example_inputs, kwargs)
        found.append(_discovery(stages, journal, model, example_inputs, kwargs, found))
        runtime = Runtime(found[-1].regions, parts, timestep, memory_options(None, None, None), compile)
        fast = _passes(stages, model, runtime, example_inputs, kwargs)
        _steps(stages, ends, model, fast, example_inputs, kwargs)
    except Stopped:
        pass  # the stages have it
    seen = found[-1] if found else None
    candidates = candidate_reports(model, journal, seen) if isinstance(model, nn.Module) else ()
    return DoctorReport(type(model).__name__, stages.all(), candidates, stages.error, stages.code)


def _discovery(
    stages: Stages,
    journal: Journal,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: list[Discovery],
) -> Discovery:
    """Discovery; what it found before it stopped is appended to `found`.

    Raises:
        Stopped: the model cannot be transformed.
    """
    start = time.perf_counter()
    problem: Exception | None = None
    regions = None
    try:
        regions = find_regions(model, args, kwargs, journal)
    except Exception as error:  # noqa: BLE001  # a diagnosis tells where it stopped, whatever stopped it
        problem = error
    seen = regions or journal.found
    if seen is not None and regions is None:
        found.append(seen)
    took = time.perf_counter() - start
    reached = [name for name in ("candidates", "probe", "second run") if name in journal.seconds]
    broke = problem is not None and seen is None
    for name in reached[:-1] if broke else reached:
        stages.add(name, journal.seconds[name], _note(journal) if name == "candidates" else "")
    if problem is not None and broke:
        name = reached[-1] if reached else "candidates"
        stages.stop(name, journal.seconds.get(name, took), problem)
        raise Stopped
    for kind in _PROOFS:
        own = [attempt for attempt in journal.attempts if attempt.kind == kind]
        tried = [attempt for attempt in own if attempt.error is not None or attempt.code is not None]
        seconds = sum(attempt.seconds for attempt in tried)
        stages.add(f"proof by {kind}", seconds, _proven(tried))
    if isinstance(problem, UnsupportedModelError):
        stages.stop("behaviour", journal.seconds.get("behaviour", 0.0), problem)
        raise Stopped
    asked = "behaviour" in journal.seconds
    stages.add("behaviour", journal.seconds.get("behaviour", 0.0), "" if asked else "not looked at: no experts")
    assert seen is not None, "discovery ended"
    unproven = sum(refusal.is_moe for refusal in seen.refused)
    note = f"{len(seen.regions)} of {len(seen.regions) + unproven} layers proven"
    if problem is not None:
        stages.stop("regions", 0.0, problem, note)
        raise Stopped
    stages.add("regions", 0.0, note)
    assert regions is not None, "it raised else"
    return regions


def _note(journal: Journal) -> str:
    return f"{len(journal.candidates)} found"


def _proven(tried: list[Attempt]) -> str:
    held = sum(attempt.error is not None for attempt in tried)
    return f"{held} of {len(tried)} held" if tried else "none to try"


def _passes(
    stages: Stages, model: nn.Module, runtime: Runtime, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TransformedModel:
    """The transformed model, one stage a pass.

    Raises:
        Stopped: in a pass, or around them.
    """
    last = time.perf_counter()

    def told(name: str, _state: object) -> None:
        nonlocal last
        now = time.perf_counter()
        stages.add(name, now - last)
        last = now

    try:
        view = share_weights(model)  # stacking moves weights; the model keeps its own
        stack_experts(view, runtime.regions)
        fast = make_transformed(view, runtime)
        with watched(told):
            runtime.prepare(fast, args, kwargs)
    except Exception as error:  # a diagnosis tells where it stopped, whatever stopped it
        missing = next((name for name in _PASSES if name not in stages.done), "rest of transform")
        stages.stop(missing, time.perf_counter() - last, error)
        raise Stopped from error
    stages.add("rest of transform", time.perf_counter() - last, "the timestep, the graphs' order")
    return fast


def _steps(
    stages: Stages,
    names: tuple[str, ...],
    model: nn.Module,
    fast: TransformedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """A full step, compared with the model, and cached ones on inputs that change a little.

    Raises:
        Stopped: one failed.
    """
    _, first, others = names
    with torch.no_grad(), warnings.catch_warnings(), fast.session() as session:
        warnings.simplefilter("ignore", NothingReusedWarning)  # the note says it
        with stages.stage(first) as note:
            error = _difference(model(*args, **kwargs), fast(*args, **kwargs))
            note.append(f"differs from the model by {error:.1e} relative")
        with stages.stage(others) as note:
            for step in range(1, _STEPS):
                session.next_step()
                given, named = pytree.tree_map(lambda leaf, step=step: _later(leaf, step), (args, kwargs))
                fast(*given, **named)
            statistics = fast.stats()
            note.append(f"{statistics.cached_steps} of {_STEPS - 1}, reusing {statistics.reuse_ratio:.0%} of branches")


def _later(leaf: Any, step: int) -> Any:
    """An input some steps later: nearly the same."""
    return leaf * (1 - 0.01 * step) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _difference(want: Any, have: Any) -> float:
    pairs = zip(pytree.tree_leaves(want), pytree.tree_leaves(have), strict=True)
    worst = 0.0
    for a, b in pairs:
        if isinstance(a, Tensor) and a.numel() and a.is_floating_point():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst
