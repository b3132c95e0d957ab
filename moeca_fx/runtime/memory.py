"""How many bytes the caches take, before and during a run."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moeca_fx.graph.state import StateSpec


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of cache.

    Attributes:
        sites: (site path, bytes), in network order.
        states: (state name, bytes), e.g. ``("blocks.1.mlp.feature", 4194304)``.
        batch: samples that the bytes are for.
    """

    sites: tuple[tuple[str, int], ...]
    states: tuple[tuple[str, int], ...]
    batch: int

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(size for _, size in self.sites)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"batch": self.batch, "total": self.total, "sites": dict(self.sites), "states": dict(self.states)}

    def __str__(self) -> str:
        width = max([28, *(len(path) + 2 for path, _ in self.sites)])
        lines = [f"{path:<{width}}{size / 2**20:>10.2f} MiB" for path, size in self.sites]
        return "\n".join([f"cache for {self.batch} samples: {self.total / 2**20:.2f} MiB", *lines])


def report(states: Iterable[tuple[StateSpec, int]], batch: int) -> MemoryReport:
    """Sum (state, bytes) pairs by site; a state that appears several times (contexts) adds up."""
    sites: dict[str, int] = {}
    names: dict[str, int] = {}
    for state, size in states:
        sites[state.site] = sites.get(state.site, 0) + size
        names[state.name] = names.get(state.name, 0) + size
    return MemoryReport(tuple(sites.items()), tuple(names.items()), batch)
