"""The two weights of MoECa's score over a grid (the paper's Table 5)."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from moeca_fx.bench.plots.style import figure, save, tidy
from moeca_fx.bench.run import Row
from moeca_fx.bench.studies import LAMBDA1S, LAMBDA2S


def plot_lambdas(rows: Sequence[Row], title: str, path: Path) -> Path:
    """PSNR and FLOPs speed-up in each cell of the grid.

    Args:
        rows: of `moeca_fx.bench.studies.lambda_entries`, in that order.
    """
    made, axes = figure(11, 4.4, columns=2)
    found = [(row.quality.psnr or math.nan, row.quality.flops_speedup) for row in rows if row.quality is not None]
    psnr, speedup = torch.tensor(found, dtype=torch.float64).T
    for panel, name, values, form in ((axes[0], "PSNR, dB", psnr, ".1f"), (axes[1], "FLOPs speed-up", speedup, ".2f")):
        grid = values.view(len(LAMBDA1S), len(LAMBDA2S))
        panel.imshow(grid.numpy(), cmap="viridis", origin="lower", aspect="auto")
        tidy(panel, f"{title}: {name}" if panel is axes[0] else name, "lambda2 (contribution)", "lambda1 (drift)")
        panel.grid(False)
        panel.set_xticks(range(len(LAMBDA2S)), [f"{value:g}" for value in LAMBDA2S])
        panel.set_yticks(range(len(LAMBDA1S)), [f"{value:g}" for value in LAMBDA1S])
        middle = float(grid.nan_to_num(0).mean())
        for (row, column), value in ((at, float(grid[at])) for at in _cells()):
            colour = "white" if value < middle else "black"
            panel.text(column, row, format(value, form), ha="center", va="center", fontsize=8, color=colour)
    return save(made, path)


def _cells() -> list[tuple[int, int]]:
    return [(row, column) for row in range(len(LAMBDA1S)) for column in range(len(LAMBDA2S))]
