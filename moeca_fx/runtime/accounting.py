"""Accounting: what the steps of every program executed, summed up as statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moeca_fx.graph.sites import MoESite, kind_of
from moeca_fx.graph.state import Counter
from moeca_fx.runtime.flops import StepFlops, measure_step_flops, node_flops
from moeca_fx.runtime.program import Program
from moeca_fx.runtime.statistics import SiteStatistics, Statistics, site_statistics


@dataclass
class Tally:
    """Steps of one program at one batch size.

    Attributes:
        shapes: the flat inputs, tensors without data; device: where they live.
        counters: sum of the cached steps' counters, on the device.
    """

    program: Program
    batch: int
    shapes: list[Any]
    device: torch.device
    full_steps: int = 0
    cached_steps: int = 0
    counters: Tensor | None = None
    flops: StepFlops | None = None

    def count_cached(self, counters: Tensor) -> None:
        """Add one cached step."""
        self.cached_steps += 1
        self.counters = counters if self.counters is None else self.counters + counters

    def counts(self) -> dict[Counter, int]:
        """Counter totals; waits for the device."""
        if self.counters is None or self.program.graphs is None:
            return {}
        return dict(zip(self.program.graphs.counters, self.counters.tolist(), strict=True))

    def step_flops(self) -> StepFlops:
        """FLOPs of this program's steps at this batch size, measured once."""
        if self.flops is None:
            leaves = [torch.empty_like(s, device=self.device) if isinstance(s, Tensor) else s for s in self.shapes]
            graphs = self.program.graphs
            if graphs is None:
                total = sum(node_flops(self.program.plain, leaves).values())
                self.flops = StepFlops(total, total, {})
            else:
                self.flops = measure_step_flops(graphs.full, graphs.cached, graphs.states, leaves, self.batch)
        return self.flops


class Accounting:
    """Tallies of all programs and batch sizes since the last reset."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[int, int], Tally] = {}
        self.trajectories = 0

    def tally(self, program: Program, leaves: Sequence[Any], batch: int) -> Tally:
        """The tally of a call."""
        key = (id(program), batch)
        if key not in self.tallies:
            shapes = [torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
            self.tallies[key] = Tally(program, batch, shapes, device)
        return self.tallies[key]

    def statistics(self) -> Statistics:
        """Totals so far."""
        sites: dict[str, list[SiteStatistics]] = {}
        executed = uncached = 0
        for tally in self.tallies.values():
            flops, counts = tally.step_flops(), tally.counts()
            executed += flops.executed(tally.full_steps, tally.cached_steps, counts)
            uncached += flops.full * (tally.full_steps + tally.cached_steps)
            actions = dict(tally.program.graphs.actions) if tally.program.graphs else {}
            samples = tally.cached_steps * tally.batch
            kept = {state.name for state in tally.program.graphs.states} if tally.program.graphs else set()
            for site in tally.program.sites.ordered:
                action = actions.get(site.path, "full")
                if isinstance(site, MoESite) and site.shared and f"{site.path}.shared" not in kept:
                    action = "full"  # a shared expert without a cache runs on every row
                part = site_statistics(site, kind_of(site), action, samples, counts)
                sites.setdefault(site.path, []).append(part)
        return Statistics(
            sites=tuple(_sum_up(parts) for parts in sites.values()),
            full_steps=sum(tally.full_steps for tally in self.tallies.values()),
            cached_steps=sum(tally.cached_steps for tally in self.tallies.values()),
            trajectories=self.trajectories,
            flops_executed=executed,
            flops_uncached=uncached,
        )


def _sum_up(parts: list[SiteStatistics]) -> SiteStatistics:
    """One site's counts under all programs together."""
    numbers = [item.name for item in fields(parts[0]) if item.name not in ("path", "kind")]
    return replace(parts[0], **{name: sum(getattr(part, name) for part in parts) for name in numbers})
