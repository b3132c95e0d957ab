"""Quality against each hyperparameter of MoECa (the paper's Fig. 7), with the work each value takes."""

import math
from collections.abc import Sequence
from pathlib import Path

from moeca_fx.bench.plots.style import FAINT, HUES, PAPER, figure, save, tidy
from moeca_fx.bench.run import Row
from moeca_fx.bench.studies import HYPERPARAMETERS, TAU0S

DEFAULTS = {"interval": 4, "tau0": 0.8, "alpha": 0.6, "beta": 0.65, "lambda1": 1.1, "lambda2": 0.6}


def plot_hyperparameters(rows: Sequence[Row], title: str, path: Path) -> Path:
    """A column a hyperparameter: PSNR above, FLOPs speed-up below; the published value is marked.

    Args:
        rows: of `moeca_fx.bench.studies.hyperparameter_entries`.
    """
    made, axes = figure(15, 5.4, 2, len(HYPERPARAMETERS))
    for column, name in enumerate(HYPERPARAMETERS):
        above, below = axes[column], axes[column + len(HYPERPARAMETERS)]
        for number, tau0 in enumerate((None,) if name == "tau0" else TAU0S):
            colour = (PAPER, HUES[0])[number]
            points = sorted(_point(row, name) for row in rows if row.quality and _belongs(row, name, tau0))
            values, psnr, median, speedup = zip(*points, strict=True)
            shown = None if tau0 is None else f"tau0 = {tau0:g}"
            above.plot(values, psnr, color=colour, marker="o", markersize=4, linewidth=1.5, label=shown)
            above.plot(values, median, color=colour, marker="o", markersize=2, linewidth=0.8, linestyle="--")
            below.plot(values, speedup, color=colour, marker="o", markersize=4, linewidth=1.5)
        for each in (above, below):
            each.axvline(DEFAULTS[name], color=FAINT, linewidth=4, zorder=0)
        tidy(above, name, "", "PSNR, dB" if column == 0 else "")
        tidy(below, "", name, "FLOPs speed-up" if column == 0 else "")
    axes[-1 - len(HYPERPARAMETERS)].legend(frameon=False, fontsize=8)
    made.suptitle(
        f"{title}; dashed: median image; the grey band marks the published value", x=0.01, ha="left", fontsize=11
    )
    return save(made, path)


def _point(row: Row, name: str) -> tuple[float, float, float, float]:
    """Value, PSNR, median PSNR and FLOPs speed-up; equal images are left out of the lines."""
    quality = row.quality
    assert quality is not None
    psnr, median = (math.nan if value is None else value for value in (quality.psnr, quality.psnr_median))
    return float(row.entry.fields[name]), psnr, median, quality.flops_speedup


def _belongs(row: Row, name: str, tau0: float | None) -> bool:
    fields = set(row.entry.fields)
    if tau0 is None:
        return fields == {name}
    return fields == {"tau0", name} and row.entry.fields["tau0"] == tau0
