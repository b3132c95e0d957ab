"""Which terms of MoECa's score earn their place (the paper's Table 4)."""

from collections.abc import Sequence
from pathlib import Path

from moeca_fx.bench.plots.style import FAINT, INK, OURS, PAPER, figure, save, tidy
from moeca_fx.bench.studies import ScoreResult


def plot_score(results: Sequence[ScoreResult], title: str, path: Path) -> Path:
    """PSNR of each combination of terms: at each threshold, and at the same work; FLOPs speed-ups as text."""
    at_thresholds = dict.fromkeys(result.at for result in results if not result.same_work)
    panels = [(f"tau0 = {at:g}", [r for r in results if not r.same_work and r.at == at]) for at in at_thresholds]
    panels.append(("same work: own tau0 each", [r for r in results if r.same_work]))
    made, axes = figure(4 * len(panels), 3.4, columns=len(panels))
    found = [r.row.quality.psnr for r in results if r.row.quality and r.row.quality.psnr is not None] or [0.0]
    span = max(found) - min(found) + 1
    for panel, (name, chosen) in zip(axes, panels, strict=True):
        full = max(chosen, key=lambda result: len(result.terms))
        for place, result in enumerate(reversed(chosen)):
            quality = result.row.quality
            if quality is None or quality.psnr is None:
                continue
            colour = OURS if result is full else PAPER
            panel.plot(quality.psnr, place, "o", color=colour, markersize=7, zorder=3)
            text, at = f"{quality.flops_speedup:.2f}x", (quality.psnr, place)
            panel.annotate(text, at, (7, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
        tidy(panel, name, "PSNR, dB (text: FLOPs speed-up)", "")
        panel.set_yticks(range(len(chosen)), [result.terms for result in reversed(chosen)])
        panel.grid(axis="y", color=FAINT)
        panel.set_xlim(min(found) - 0.1 * span, max(found) + 0.3 * span)  # one scale: differences mean the same
    made.suptitle(f"{title}: w routing weight, Δ its drift, o cached contribution", x=0.01, ha="left", fontsize=11)
    return save(made, path)
