"""Quality against work: every run a point, every method a line along its own best settings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeca_fx.bench.frontier import frontier
from moeca_fx.bench.plots.style import INK, MUTED, figure, looks, save, tidy
from moeca_fx.bench.run import Row
from moeca_fx.bench.suite import peers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Speed = Callable[[Row], float | None]

TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20)
SLOWEST = 1.1
"""Below this FLOPs speed-up a run does next to nothing, and its PSNR would set the scale."""

SIZES = {"ours": 90, "paper": 40, "peer": 22}


def plot_flops(rows: Sequence[Row], title: str, path: Path) -> Path:
    """PSNR against the FLOPs speed-up."""
    made, (axes,) = figure(9.5, 5.6)
    _draw(axes, rows, lambda row: row.quality.flops_speedup if row.quality else None)
    tidy(axes, title, "FLOPs speed-up", "PSNR against the original, dB")
    _finish(axes)
    return save(made, path)


def plot_latency(rows: Sequence[Row], title: str, path: Path) -> Path | None:
    """PSNR against the speed-up in time; None when nothing was timed."""
    timed = [row for row in rows if row.latency is not None]
    if not timed:
        return None
    made, (axes,) = figure(9.5, 5.6)
    _draw(axes, timed, lambda row: row.latency.speedup if row.latency else None)
    tidy(axes, title, "speed-up in time over the original", "PSNR against the original, dB")
    _finish(axes)
    for row in timed:
        if row.entry.kind == "vectorised" and row.latency is not None:
            axes.axvline(row.latency.speedup, color=INK, linewidth=1, linestyle=":")
            at = (row.latency.speedup, axes.get_ylim()[1])
            axes.annotate("vectorised, no cache", at, color=MUTED, fontsize=8, rotation=90, va="top", ha="right")
    return save(made, path)


def _draw(axes: "Axes", rows: Sequence[Row], speed: Speed) -> None:
    families = list(dict.fromkeys((row.entry.family, row.entry.group) for row in rows))
    look = looks(list(dict.fromkeys([*((peer, "peer") for peer in peers()), *families])))
    for family, group in families:
        points = [point for row in rows if row.entry.family == family and (point := _point(row, speed)) is not None]
        if not points or group == "baseline":
            continue
        colour, mark = look[family]
        bold = group != "peer"
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=SIZES[group], color=colour, marker=mark, alpha=0.9, zorder=3 + bold, label=family)
        x, y = zip(*frontier(points, lambda point: point[0], lambda point: point[1]), strict=True)
        axes.plot(x, y, color=colour, linewidth=2 if bold else 1, alpha=0.9, zorder=2 + bold)


def _point(row: Row, speed: Speed) -> tuple[float, float] | None:
    quality, at = row.quality, speed(row)
    if quality is None or quality.psnr is None or at is None or quality.flops_speedup < SLOWEST:
        return None
    return at, quality.psnr


def _finish(axes: "Axes") -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    shown = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}x" for tick in shown])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor=INK)
