"""Reuse over match, step by step (the paper's Fig. 8)."""

from collections.abc import Mapping
from pathlib import Path

from moeca_fx.bench.plots.style import FAINT, HUES, OURS, figure, save, tidy
from moeca_fx.bench.traces import ReuseTrace


def plot_reuse(traces: Mapping[str, ReuseTrace], title: str, path: Path) -> Path:
    """Share of the matched branches that a step reused, and of all branches that were matched.

    Args:
        traces: by label; the first is drawn boldest.
    """
    made, (reuse, match) = figure(9.5, 4.2, columns=2)
    for number, (label, trace) in enumerate(traces.items()):
        colour = OURS if number == 0 else HUES[(number - 1) % len(HUES)]
        width = 1.8 if number == 0 else 1.1
        for shares in trace.by_site.values() if number == 0 else ():
            reuse.plot(trace.steps, shares, color=FAINT, linewidth=0.8, zorder=1)
        reuse.plot(trace.steps, trace.reuse_over_match, color=colour, linewidth=width, label=label, zorder=3)
        match.plot(trace.steps, trace.match, color=colour, linewidth=width, label=label, zorder=3)
    made.suptitle(title, x=0.01, horizontalalignment="left", fontsize=11)
    tidy(reuse, "reused of the matched (grey: single layers)", "denoising step", "reuse over match")
    tidy(match, "matched of all branches", "denoising step", "match")
    match.legend(frameon=False, fontsize=9)
    return save(made, path)
