"""Accounting: what the steps of every program executed, summed up as statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from moeca_fx.graph.sites import MoESite, kind_of
from moeca_fx.graph.state import Counter
from moeca_fx.runtime.flops import StepFlops
from moeca_fx.runtime.program import Program
from moeca_fx.runtime.statistics import SiteStatistics, Statistics, site_statistics


@dataclass
class Tally:
    """Steps of one program at one batch size.

    Attributes:
        shapes: the flat inputs, tensors without data; device: where they live.
        full_steps: full steps that fill caches; full_counters: sum of their counters, if they have any.
        plain_steps: steps without caches.
        rule_steps: steps of each rule; counters: sum of each rule's counters, on the device.
    """

    program: Program
    batch: int
    shapes: list[Any]
    device: torch.device
    full_steps: int = 0
    plain_steps: int = 0
    rule_steps: dict[int, int] = field(default_factory=dict)
    counters: dict[int, Tensor] = field(default_factory=dict)
    full_counters: Tensor | None = None
    flops: StepFlops | None = None

    @property
    def cached_steps(self) -> int:
        """Steps of any rule."""
        return sum(self.rule_steps.values())

    def count_full(self, counters: Tensor | None) -> None:
        """Add one full step that fills caches."""
        self.full_steps += 1
        if counters is not None:
            self.full_counters = counters if self.full_counters is None else self.full_counters + counters

    def count_cached(self, rule: int, counters: Tensor | None) -> None:
        """Add one step of a rule."""
        self.rule_steps[rule] = self.rule_steps.get(rule, 0) + 1
        if counters is not None:
            self.counters[rule] = self.counters[rule] + counters if rule in self.counters else counters

    def counts(self, rule: int) -> dict[Counter, int]:
        """Counter totals of a rule; waits for the device."""
        if rule not in self.counters or self.program.graphs is None:
            return {}
        return dict(zip(self.program.graphs.rules[rule].counters, self.counters[rule].tolist(), strict=True))

    def full_counts(self) -> dict[Counter, int]:
        """Counter totals of the full steps; waits for the device."""
        if self.full_counters is None or self.program.graphs is None:
            return {}
        return dict(zip(self.program.graphs.full_step.counters, self.full_counters.tolist(), strict=True))

    def _filled(self) -> dict[Counter, int]:
        """Branches of one step where no slot is empty."""
        return {Counter(site.path, "present"): site.branches * self.batch for site in self.program.sites.moe}

    def step_flops(self) -> StepFlops:
        """FLOPs of this program's steps at this batch size, measured once."""
        if self.flops is None:
            leaves = [torch.empty_like(s, device=self.device) if isinstance(s, Tensor) else s for s in self.shapes]
            self.flops = self.program.step_flops(leaves, self.batch)
        return self.flops

    def executed(self) -> int:
        """FLOPs of all these steps."""
        flops = self.step_flops()
        probes = flops.probe * (self.full_steps + self.cached_steps)
        rules = (flops.rules[rule].executed(steps, self.counts(rule)) for rule, steps in self.rule_steps.items())
        full = flops.full.executed(self.full_steps, self.full_counts())
        return full + flops.uncached.executed(1, self._filled()) * self.plain_steps + probes + sum(rules)

    def uncached(self) -> int:
        """FLOPs of all these steps without caches.

        Where slots may be empty, cached steps count as many branches as the full steps had; steps without caches, which
        count nothing, and all steps before the first full one, as if no slot were empty.
        """
        cost, filled = self.step_flops().uncached, self._filled()
        steps, present = self.full_steps + self.cached_steps, self.full_counts()
        usual = {counter: present[counter] * steps // self.full_steps for counter in present}
        counts = usual or {counter: count * steps for counter, count in filled.items()}
        return cost.executed(steps, counts) + cost.executed(1, filled) * self.plain_steps

    def site_statistics(self) -> list[SiteStatistics]:
        """One entry a site, summed over the rules."""
        graphs, found = self.program.graphs, []
        for site in self.program.sites.ordered:
            parts = [site_statistics(site, kind_of(site), "full", 0, {})]
            for rule, steps in self.rule_steps.items():
                assert graphs is not None
                action = dict(graphs.rules[rule].actions)[site.path]
                kept = {state.name for state in graphs.states}
                caches_branches = isinstance(site, MoESite) and f"{site.path}.feature" in kept
                has_shared = isinstance(site, MoESite) and site.shared is not None
                shared_in_full = caches_branches and has_shared and f"{site.path}.shared" not in kept
                rule_counts = self.counts(rule)
                samples = steps * self.batch
                parts.append(site_statistics(site, kind_of(site), action, samples, rule_counts, shared_in_full))
            found.append(_sum_up(parts))
        return found


class Accounting:
    """Calls, and tallies of all programs and batch sizes, since the last reset."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[int, int], Tally] = {}
        self.trajectories = self.full_calls = self.cached_calls = self.samples_left_out = 0

    def count_call(self, reuses: bool, left_out: int = 0) -> None:
        """Add one call of the model, however many chunks it ran in.

        Args:
            reuses: whether any sample took a step of a rule.
            left_out: samples beyond what the cache may hold.
        """
        self.cached_calls += reuses
        self.full_calls += not reuses
        self.samples_left_out += left_out

    def tally(self, program: Program, leaves: Sequence[Any], batch: int) -> Tally:
        """The tally of a call."""
        key = (id(program), batch)
        if key not in self.tallies:
            shapes = [torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
            self.tallies[key] = Tally(program, batch, shapes, device)
        return self.tallies[key]

    def statistics(self) -> Statistics:
        """Totals so far; FLOPs and sites by what every chunk did, steps by the calls of the model."""
        sites: dict[str, list[SiteStatistics]] = {}
        executed = uncached = 0
        for tally in self.tallies.values():
            executed += tally.executed()
            uncached += tally.uncached()
            for part in tally.site_statistics():
                sites.setdefault(part.path, []).append(part)
        return Statistics(
            sites=tuple(_sum_up(parts) for parts in sites.values()),
            full_steps=self.full_calls,
            cached_steps=self.cached_calls,
            trajectories=self.trajectories,
            samples_left_out=self.samples_left_out,
            flops_executed=executed,
            flops_uncached=uncached,
        )


def _sum_up(parts: list[SiteStatistics]) -> SiteStatistics:
    """One site's counts under all programs together."""
    numbers = [item.name for item in fields(parts[0]) if item.name not in ("path", "kind")]
    return replace(parts[0], **{name: sum(getattr(part, name) for part in parts) for name in numbers})
