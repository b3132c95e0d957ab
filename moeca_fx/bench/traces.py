"""What happens step by step: reuse of a cached run, drift and routing of the original.

Runs of their own, never timed: watching a step costs more than the step.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import policies
from moeca_fx.bench.contestants import OnStep
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.subject import Subject
from moeca_fx.errors import InputError
from moeca_fx.runtime.statistics import Statistics
from moeca_fx.zoo.sampling import sample


@dataclass(frozen=True)
class ReuseTrace:
    """Branches of a cached run, step by step; full steps are left out.

    Attributes:
        steps: index of each step that was not full.
        match, reuse_over_match: shares of that step, all sites together.
        by_site: reuse over match of each MoE site, by its path.
    """

    steps: tuple[int, ...]
    match: tuple[float, ...]
    reuse_over_match: tuple[float, ...]
    by_site: dict[str, tuple[float, ...]]


def trace_reuse(subject: Subject, settings: BenchSettings, method: Any) -> ReuseTrace:
    """Run one batch under a policy and read its statistics after every step (the paper's Fig. 8).

    Raises:
        InputError: the policy reused no branches, or has none to match.
    """
    fast = subject.transformed(method)
    seen: list[Statistics] = [fast.stats()]  # that of step 0, which is full, has no sites yet
    _sample(subject, settings, fast, lambda *_: seen.append(fast.stats()))
    steps = [step for step in range(settings.steps) if seen[step + 1].cached_steps > seen[step].cached_steps]
    if not steps or seen[-1].matched_branches == 0:
        raise InputError("trace_reuse: this policy matches no branches; choose one that works on branches, e.g. moeca")
    paths = [site.path for site in seen[-1].sites]
    sites = [number for number, site in enumerate(seen[-1].sites) if site.kind == "moe"]

    def shares(step: int, numbers: list[int]) -> tuple[float, float]:
        before, after = seen[step].sites, seen[step + 1].sites
        branches = sum(after[n].branches - before[n].branches for n in numbers)
        matched = sum(after[n].matched - before[n].matched for n in numbers)
        recomputed = sum(after[n].recomputed - before[n].recomputed for n in numbers)
        return matched / branches, (branches - recomputed) / matched if matched else 0.0

    totals = [shares(step, sites) for step in steps]
    return ReuseTrace(
        steps=tuple(steps),
        match=tuple(match for match, _ in totals),
        reuse_over_match=tuple(reuse for _, reuse in totals),
        by_site={paths[n]: tuple(shares(step, [n])[1] for step in steps) for n in sites},
    )


@dataclass(frozen=True)
class DriftTrace:
    """How far the output of every layer moves from step to step.

    Attributes:
        sites: (path, kind) of each layer, in network order.
        drift: [layers, steps - 1], the relative change ``|f_s - f_(s-1)| / |f_(s-1)|`` over the whole batch.
    """

    sites: tuple[tuple[str, str], ...]
    drift: Tensor


def trace_drift(subject: Subject, settings: BenchSettings) -> DriftTrace:
    """Run one batch of the original and compare every layer's output with that of the step before (Fig. 9)."""
    found = moeca_fx.inspect(subject.model, subject.example(2)).sites
    sites = tuple((site.path, site.kind) for site in found)
    last: dict[str, Tensor] = {}
    rows: dict[str, list[float]] = {path: [] for path, _ in sites}

    def watch(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            if path in last:
                rows[path].append(float((output - last[path]).norm() / last[path].norm()))
            last[path] = output

        return subject.model.get_submodule(path).register_forward_hook(hook)

    handles = [watch(path) for path, _ in sites]
    try:
        _sample(subject, settings, subject.model)
    finally:
        for handle in handles:
            handle.remove()
    return DriftTrace(sites, torch.tensor([rows[path] for path, _ in sites]))


@dataclass(frozen=True)
class RoutingTrace:
    """How often every token position was sent to every expert.

    Attributes:
        path: of the MoE site.
        counts: [windows, E, T], selections over the batch in each window of steps.
        windows: first and last step of each window.
    """

    path: str
    counts: Tensor
    windows: tuple[tuple[int, int], ...]


def trace_routing(subject: Subject, settings: BenchSettings, windows: int = 4) -> list[RoutingTrace]:
    """Run one batch with every step full and count the routing of each MoE site (Fig. 4)."""
    windows = min(windows, settings.steps)
    fast = subject.transformed(policies.build("moeca", interval=1))
    counts: dict[str, Tensor] = {}

    def count(done: int, steps: int) -> None:
        window = (done - 1) * windows // steps
        for name, state in fast.cache().items():
            if not name.endswith(".activation"):
                continue
            path = name.removesuffix(".activation")
            chosen = fast.cache()[f"{path}.expert"].transpose(0, 1).flatten(1)  # [T, B * k]
            selected = torch.zeros(len(chosen), state.shape[1])  # [T, E]
            selected.scatter_add_(1, chosen, torch.ones(chosen.shape))
            counts.setdefault(path, torch.zeros(windows, *selected.T.shape))[window] += selected.T

    _sample(subject, settings, fast, count)
    edges = [-(-window * settings.steps // windows) for window in range(windows + 1)]
    spans = tuple((first, last - 1) for first, last in pairwise(edges))
    return [RoutingTrace(path, found, spans) for path, found in counts.items()]


def _sample(subject: Subject, settings: BenchSettings, model: nn.Module, on_step: OnStep | None = None) -> Tensor:
    velocity = subject.velocity(model)
    noise, labels = (part[: settings.batch] for part in subject.start(settings))
    return sample(velocity, noise, labels, settings.steps, on_step, sampler=settings.sampler, seed=settings.seed)
