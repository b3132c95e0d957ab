"""How far the recommended policies are ahead of the best peer at given speed-ups, or behind."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from moeca_fx.bench.frontier import frontier
from moeca_fx.bench.run import Row
from moeca_fx.tuning.target import SLACK

TARGETS = (2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Margin:
    """One target.

    Attributes:
        target: FLOPs speed-up that must be reached.
        ours, ours_speedup, ours_psnr: the recommended run with the highest PSNR that reaches it; None without one.
        peer, peer_speedup, peer_psnr: the same among the peers and MoECa as published.
        margin: ours minus the peer's PSNR, dB.
        margin_between: ours minus the peers' PSNR at *our* speed-up, between the settings they were run at: straight
            lines over log speed-up along each peer's own best settings. Does not profit from gaps in those settings.
        margin_median: the same comparison by the median image, each side with the run that is best by it. `margin` is
            decided by the one image that errs most, often one that tips over into another.
        fid_change: ours minus that peer's FID; None without FIDs.
    """

    target: float
    ours: str | None = None
    ours_speedup: float | None = None
    ours_psnr: float | None = None
    peer: str | None = None
    peer_speedup: float | None = None
    peer_psnr: float | None = None
    margin: float | None = None
    margin_between: float | None = None
    margin_median: float | None = None
    fid_change: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


@dataclass(frozen=True)
class _Point:
    family: str
    name: str
    speedup: float
    psnr: float
    median: float
    fid: float | None


def margins(rows: Sequence[Row], targets: Sequence[float] = TARGETS) -> list[Margin]:
    """One margin a target; runs that equal the original exactly (no speed-up to speak of) take no part."""
    ours = _points(rows, ("ours",))
    peers = _points(rows, ("peer", "paper"))
    return [_margin(target, ours, peers) for target in targets]


def _points(rows: Sequence[Row], groups: tuple[str, ...]) -> list[_Point]:
    return [
        _Point(row.entry.family, row.entry.name, row.quality.flops_speedup, psnr, median, row.quality.fid)
        for row in rows
        if row.quality is not None
        and row.entry.group in groups
        and (psnr := row.quality.psnr) is not None
        and (median := row.quality.psnr_median) is not None
    ]


def _margin(target: float, ours: list[_Point], peers: list[_Point]) -> Margin:
    mine, theirs = _best(target, ours), _best(target, peers)
    found: dict[str, Any] = {}
    if mine is not None:
        found |= {"ours": mine.name, "ours_speedup": mine.speedup, "ours_psnr": mine.psnr}
        found["margin_between"] = _ahead_between(mine, peers)
    if theirs is not None:
        found |= {"peer": theirs.name, "peer_speedup": theirs.speedup, "peer_psnr": theirs.psnr}
    if mine is not None and theirs is not None:
        found["margin"] = mine.psnr - theirs.psnr
        medians = [max(point.median for point in _reaching(target, points)) for points in (ours, peers)]
        found["margin_median"] = medians[0] - medians[1]
        if mine.fid is not None and theirs.fid is not None:
            found["fid_change"] = mine.fid - theirs.fid
    return Margin(target, **found)


def _ahead_between(mine: _Point, peers: list[_Point]) -> float | None:
    families = dict.fromkeys(point.family for point in peers)
    found = [_between(mine.speedup, [point for point in peers if point.family == family]) for family in families]
    known = [psnr for psnr in found if psnr is not None]
    return mine.psnr - max(known) if known else None


def _best(target: float, points: list[_Point]) -> _Point | None:
    return max(_reaching(target, points), key=lambda point: point.psnr, default=None)


def _reaching(target: float, points: list[_Point]) -> list[_Point]:
    return [point for point in points if point.speedup >= target * (1 - SLACK)]


def _between(speedup: float, points: list[_Point]) -> float | None:
    """PSNR of one peer at a speed-up inside the range of its settings, those that none of its others beats."""
    best = frontier(points, lambda point: point.speedup, lambda point: point.psnr)
    for low, high in pairwise(best):
        if low.speedup <= speedup <= high.speedup:
            width = math.log(high.speedup / low.speedup)
            share = math.log(speedup / low.speedup) / width if width else 0.0
            return low.psnr + share * (high.psnr - low.psnr)
    return None
