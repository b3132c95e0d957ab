"""How far each layer's output moves from step to step (the paper's Fig. 9)."""

from pathlib import Path

from moeca_fx.bench.plots.style import MUTED, figure, save, tidy
from moeca_fx.bench.traces import DriftTrace

KINDS = {"moe": "MoE", "attention": "attention", "dense_ffn": "dense"}


def plot_drift(trace: DriftTrace, title: str, path: Path) -> Path:
    """A row a layer, a column a step; colour on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    layers, steps = trace.drift.shape
    made, (axes,) = figure(9.5, 1.6 + 0.24 * layers)
    low = max(float(trace.drift.min()), 1e-6)
    image = axes.imshow(
        trace.drift.clamp_min(low).numpy(),
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        norm=LogNorm(low, max(float(trace.drift.max()), low * 1.01)),
        extent=(0.5, steps + 0.5, layers - 0.5, -0.5),
    )
    tidy(axes, title, "denoising step", "")
    axes.grid(False)
    axes.set_yticks(range(layers), [f"{path} {KINDS.get(kind, kind)}" for path, kind in trace.sites], fontsize=8)
    bar = made.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("relative change of the output", color=MUTED)
    return save(made, path)
