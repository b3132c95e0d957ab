"""Statistics of what a transformed model executed and reused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moeca_fx.graph.sites import MoESite, Site
from moeca_fx.graph.state import Counter


@dataclass(frozen=True)
class SiteStatistics:
    """Counts of one site over all cached steps.

    Attributes:
        path, kind: which site; kind is ``"moe"``, ``"attention"`` or ``"dense_ffn"``.
        branches: branches routed (MoE), matched: those found in the cache, recomputed: those computed anew.
        rows: token rows that passed the site, rows_recomputed: those computed anew (attention and dense feed-forward;
            for a MoE site the rows of its shared expert).
    """

    path: str
    kind: str
    branches: int
    matched: int
    recomputed: int
    rows: int
    rows_recomputed: int

    @property
    def match_ratio(self) -> float:
        """Matched branches of all branches; 0 when there are none."""
        return _ratio(self.matched, self.branches)

    @property
    def reuse_over_match(self) -> float:
        """Reused branches of matched branches (the paper's Fig. 8); 0 when nothing matched."""
        return _ratio(self.branches - self.recomputed, self.matched)


@dataclass(frozen=True)
class Statistics:
    """Totals since the model was transformed or `reset_stats` was called.

    Attributes:
        sites: per site, in network order.
        full_steps, cached_steps: forward calls of each kind, over all contexts; a call in chunks is one call, and
            cached when any of its samples reused something.
        trajectories: trajectories begun.
        samples_left_out: samples of all calls that were computed in full because of `cache_limit`; they are in the
            FLOPs, and in no count of branches or rows.
        flops_executed: what ran; flops_uncached: the same calls, every one of them a full step.
    """

    sites: tuple[SiteStatistics, ...]
    full_steps: int
    cached_steps: int
    trajectories: int
    samples_left_out: int
    flops_executed: int
    flops_uncached: int

    @property
    def branches(self) -> int:
        """Branches routed on cached steps."""
        return sum(site.branches for site in self.sites)

    @property
    def matched_branches(self) -> int:
        """Branches whose expert was in the token's cache."""
        return sum(site.matched for site in self.sites)

    @property
    def recomputed_branches(self) -> int:
        """Branches computed anew on cached steps."""
        return sum(site.recomputed for site in self.sites)

    @property
    def match_ratio(self) -> float:
        """Matched branches of all branches on cached steps."""
        return _ratio(self.matched_branches, self.branches)

    @property
    def reuse_ratio(self) -> float:
        """Reused branches of all branches on cached steps."""
        return _ratio(self.branches - self.recomputed_branches, self.branches)

    @property
    def reuse_over_match(self) -> float:
        """Reused branches of matched branches (the paper's Fig. 8)."""
        return _ratio(self.branches - self.recomputed_branches, self.matched_branches)

    @property
    def attention_rows(self) -> int:
        """Attention rows computed anew on cached steps."""
        return sum(site.rows_recomputed for site in self.sites if site.kind == "attention")

    @property
    def flops_saved(self) -> int:
        """FLOPs that reuse avoided."""
        return self.flops_uncached - self.flops_executed

    @property
    def flops_speedup(self) -> float:
        """Uncached over executed FLOPs; 1 before the first call."""
        return self.flops_uncached / self.flops_executed if self.flops_executed else 1.0

    def as_dict(self) -> dict[str, Any]:
        """All counts and ratios, ready for JSON."""
        totals = {name: getattr(self, name) for name in _TOTALS}
        ratios = [{"match_ratio": s.match_ratio, "reuse_over_match": s.reuse_over_match} for s in self.sites]
        return totals | {"sites": [asdict(site) | ratio for site, ratio in zip(self.sites, ratios, strict=True)]}

    def __str__(self) -> str:
        head = (
            f"{self.full_steps} full and {self.cached_steps} cached steps in {self.trajectories} trajectories; "
            f"FLOPs executed {self.flops_executed:.3e} of {self.flops_uncached:.3e} ({self.flops_speedup:.2f}x fewer)\n"
            f"cached steps: match {self.match_ratio:.1%}, reuse {self.reuse_ratio:.1%} of branches "
            f"({self.reuse_over_match:.1%} of matched), {self.recomputed_branches} branches and {self.attention_rows} "
            "attention rows recomputed"
        )
        if self.samples_left_out:
            head += f"\nbeyond the cache limit: {self.samples_left_out} samples of these calls computed in full"
        lines = [f"{'site':<28}{'kind':<12}{'match':>8}{'reuse/match':>13}{'branches':>12}{'rows':>12}"]
        for site in self.sites:
            moe = site.kind == "moe"
            match = f"{site.match_ratio:.1%}" if moe else "-"
            reuse = f"{site.reuse_over_match:.1%}" if moe else "-"
            lines.append(
                f"{site.path:<28}{site.kind:<12}{match:>8}{reuse:>13}"
                f"{site.recomputed if moe else '-':>12}{site.rows_recomputed:>12}"
            )
        return "\n".join([head, *lines])


_TOTALS = (
    "full_steps",
    "cached_steps",
    "trajectories",
    "samples_left_out",
    "branches",
    "matched_branches",
    "recomputed_branches",
    "match_ratio",
    "reuse_ratio",
    "reuse_over_match",
    "attention_rows",
    "flops_executed",
    "flops_uncached",
    "flops_saved",
    "flops_speedup",
)
_ROW_KINDS = {"attention": "attention_rows", "moe": "shared_rows", "dense_ffn": "ffn_rows"}


def site_statistics(
    site: Site, kind: str, action: str, samples: int, counts: Mapping[Counter, int], shared_in_full: bool = False
) -> SiteStatistics:
    """Statistics of one site over steps of one rule.

    A rule that does not route (it works on rows, blocks or the output) counts every branch as matched, and slots that
    may be empty as branches.

    Args:
        site, kind: the site.
        action: what it does on such a step.
        samples: samples that passed (steps times batch).
        counts: counter totals.
        shared_in_full: whether a MoE site runs its shared expert on every row although it reuses branches.
    """
    rows = samples * site.tokens
    slots = samples * site.branches if isinstance(site, MoESite) else 0
    branches = counts.get(Counter(site.path, "present"), slots)
    in_full = action == "full"
    recomputed_rows = counts.get(Counter(site.path, _ROW_KINDS[kind]), 0)
    if in_full or shared_in_full:
        recomputed_rows = rows
    return SiteStatistics(
        path=site.path,
        kind=kind,
        branches=branches,
        matched=counts.get(Counter(site.path, "matched"), branches),
        recomputed=branches if in_full else counts.get(Counter(site.path, "recomputed"), 0),
        rows=0 if isinstance(site, MoESite) and not site.shared else rows,
        rows_recomputed=recomputed_rows,
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
