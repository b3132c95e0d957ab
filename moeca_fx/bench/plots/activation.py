"""Where in the image each expert works, over the whole run and in parts of it (the paper's Fig. 4)."""

import math
from pathlib import Path

import torch

from moeca_fx.bench.plots.style import INK, MUTED, figure, save
from moeca_fx.bench.traces import RoutingTrace
from moeca_fx.errors import InputError

EXPERTS = 8


def plot_activation(trace: RoutingTrace, title: str, path: Path) -> Path:
    """A column an expert, from the most concentrated to the most evenly spread; the first row sums all steps.

    Of more than `EXPERTS` experts, as many are shown, evenly spread over that order.

    Raises:
        InputError: the tokens form no square grid.
    """
    _, experts, tokens = trace.counts.shape
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise InputError(f"plot_activation: expected tokens on a square grid, found {tokens}")
    total = trace.counts.sum(dim=0)  # [E, T]
    share = total / total.sum(dim=1, keepdim=True).clamp_min(1)
    order = torch.argsort(torch.special.entr(share).sum(dim=1))
    picked = order[torch.linspace(0, experts - 1, min(EXPERTS, experts)).round().long()]
    rows = [("all steps", total), *zip(_names(trace), trace.counts, strict=True)]
    made, axes = figure(1.3 * len(picked) + 1.2, 1.3 * len(rows) + 0.9, len(rows), len(picked))
    for row, (name, counts) in enumerate(rows):
        for column, expert in enumerate(picked.tolist()):
            cell = axes[row * len(picked) + column]
            cell.imshow(counts[expert].view(side, side).numpy(), cmap="viridis", vmin=0, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.spines[:].set_visible(False)
            cell.set_xlabel(f"{int(counts[expert].sum()):,}", fontsize=7, color=MUTED, labelpad=2)
            if row == 0:
                cell.set_title(f"expert {expert}", fontsize=9, color=INK)
            if column == 0:
                cell.set_ylabel(name, fontsize=8, color=INK)
    text = f"{title}: {trace.path}, tokens sent to an expert by position; each map has its own scale"
    made.suptitle(text, x=0.01, ha="left", fontsize=10)
    return save(made, path)


def _names(trace: RoutingTrace) -> list[str]:
    return [f"steps {first}-{last}" for first, last in trace.windows]
