"""``moeca-fx demo``: run the demo, show its table, write its picture and its numbers."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from moeca_fx.cli.console import stdout, step_progress
from moeca_fx.demo.result import DemoResult
from moeca_fx.demo.settings import DemoSettings
from moeca_fx.demo.table import HEADINGS, table_cells
from moeca_fx.errors import require
from moeca_fx.files import prepare_folder

DEFAULTS = DemoSettings()


def demo(
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = DEFAULTS.steps,
    batch: Annotated[int, typer.Option(help="Images sampled together.")] = DEFAULTS.batch,
    repeats: Annotated[int, typer.Option(help="Timed trajectories of each variant.")] = DEFAULTS.repeats,
    interval: Annotated[int, typer.Option(help="Cycle length: every n-th step is full.")] = DEFAULTS.interval,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = DEFAULTS.seed,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="1 or 2, whichever is faster")
    ] = None,
    compile: Annotated[bool, typer.Option(help="Run our models through torch.compile.")] = DEFAULTS.compile,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("out/demo"),
) -> None:
    """Sample digits with the original, the vectorised and the cached model, and compare time and images."""
    settings = DemoSettings(
        steps=steps,
        batch=batch,
        repeats=repeats,
        interval=interval,
        seed=seed,
        threads=threads,
        compile=compile,
    )
    for package in ("PIL", "numpy", "safetensors", "sklearn", "torchmetrics"):
        require(package, "demo")
    from moeca_fx.demo import run_demo, write_outputs

    prepare_folder(out)
    with step_progress() as progress:
        total = settings.steps * settings.repeats * 3
        run = run_demo(settings, _Bar(progress, progress.add_task("starting", total=total)))
    console = stdout()
    print_result(console, run.result)
    files = write_outputs(run, out)
    console.print(f"picture {files.picture}\nnumbers {files.numbers}", highlight=False, soft_wrap=True)


class _Bar:
    """Draws what the demo does."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def stage(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def step(self) -> None:
        self._progress.advance(self._task)


def print_result(console: Console, result: DemoResult) -> None:
    """The table of all variants, and under it how the numbers were taken."""
    settings = result.settings
    table = Table(
        title=f"Digits, {settings.batch} images, {settings.steps} steps",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        box=None,
    )
    table.add_column(HEADINGS[0], no_wrap=True)
    for heading in HEADINGS[1:]:
        table.add_column("\n".join(heading.split()), justify="right", no_wrap=True)
    for variant in result.variants:
        table.add_row(*table_cells(variant), style="bold" if variant.name == "cached" else None)
    console.print(table)
    console.print(
        f"Seconds: median over interleaved rounds ({settings.repeats}); CPU threads: {settings.threads}; float32; the "
        f"original eager, ours {'through' if result.compiled else 'without'} torch.compile. Speed-up: median of the "
        "ratios within a round. PSNR and SSIM: against the original's images from the same noise. Reuse: share of "
        "routed branches of cached steps.",
        highlight=False,
        style="dim",
    )
