"""Write what the demo found: the comparison picture and the numbers, each whole or not at all."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from moeca_fx.demo.picture import Panel, comparison
from moeca_fx.demo.result import VariantResult
from moeca_fx.demo.run import CACHED, ORIGINAL, VECTORISED, DemoRun
from moeca_fx.files import write_whole

TITLES = {ORIGINAL: "Original", VECTORISED: "Vectorised experts", CACHED: "Cached with MoECa"}


@dataclass(frozen=True)
class DemoFiles:
    """Where the outputs went."""

    picture: Path
    numbers: Path


def write_outputs(run: DemoRun, folder: Path) -> DemoFiles:
    """Write ``demo.png`` and ``demo.json`` into `folder`, creating it.

    Raises:
        MoecaError: the file system refused.
    """
    files = DemoFiles(picture=folder / "demo.png", numbers=folder / "demo.json")
    order = torch.argsort(run.labels, stable=True)
    panels = [
        Panel(TITLES[variant.name], _caption(variant), run.images[variant.name][order])
        for variant in run.result.variants
    ]
    settings = run.result.settings
    footer = (
        f"{settings.batch} class-conditional samples, sorted by class,\n"
        "from the same noise in every panel.\n"
        f"{settings.steps} Euler steps, float32, CPU threads: {settings.threads};\n"
        f"seconds are medians, rounds: {settings.repeats}."
    )
    picture = comparison(panels, columns=8, zoom=6, footer=footer)
    write_whole(files.picture, picture.save)
    text = json.dumps(run.result.as_dict(), indent=2, allow_nan=False) + "\n"
    write_whole(files.numbers, lambda path: path.write_text(text, encoding="utf-8"))
    return files


def _caption(variant: VariantResult) -> str:
    seconds = f"{variant.median_seconds:.1f} s"
    if variant.name == ORIGINAL:
        return f"{seconds}, the reference"
    likeness = "equal images" if math.isinf(variant.psnr) else f"{variant.psnr:.1f} dB PSNR"
    return f"{seconds}, speed-up {variant.speedup:.2f}, {likeness}"
