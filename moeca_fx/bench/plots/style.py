"""What all figures share: how they are made and saved, and one colour and mark for each family of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeca_fx.errors import require
from moeca_fx.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1c1e21", "#6e737a", "#d9dce0"
OURS, OURS_TOO, PAPER = "#c4302b", "#7a1fa2", "#e08214"
DPI = 150

# Peers share muted hues and differ by mark; what the reader looks for stands out. 13 hues and 10 marks repeat at 130.
HUES = (
    "#4477aa",
    "#228833",
    "#66ccee",
    "#aa3377",
    "#ccbb44",
    "#117733",
    "#6f6fb4",
    "#88ccaa",
    "#997700",
    "#555555",
    "#dd7788",
    "#332288",
    "#99bb22",
)
MARKS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "h")


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure of this size in inches and its axes, row by row.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False)
    return made, list(axes.flat)


def tidy(axes: "Axes", title: str, x: str, y: str) -> None:
    """Titles, a faint grid, no box."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9)


def save(made: "Figure", path: Path) -> Path:
    """Write a PNG, whole or not at all.

    Raises:
        MoecaError: the file system refused.
    """
    write_whole(path, lambda to: made.savefig(to, format="png"))
    return path


def looks(families: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each (family, group): muted ones for peers, in order, strong ones for ours and the paper's."""
    palettes = {
        "peer": (HUES, MARKS),
        "ours": ((OURS, OURS_TOO), ("*", "P")),
        "paper": ((PAPER,), ("o",)),
        "baseline": ((INK,), ("+",)),
    }
    counts = dict.fromkeys(palettes, 0)
    found = {}
    for family, group in families:
        hues, marks = palettes[group]
        found[family] = (hues[counts[group] % len(hues)], marks[counts[group] % len(marks)])
        counts[group] += 1
    return found
