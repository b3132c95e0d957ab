"""``moeca-fx bench TARGET``: every policy on the same noise and sampler; tables, numbers and figures."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from moeca_fx.bench.settings import BenchSettings
from moeca_fx.cli.console import stdout, step_progress
from moeca_fx.cli.flow import flow_of
from moeca_fx.cli.target import HELP, load_target
from moeca_fx.errors import require

if TYPE_CHECKING:
    from moeca_fx.bench.margins import Margin
    from moeca_fx.bench.outputs import Comparison

NOTES = (
    "{settings.samples} images of the classes with odd numbers, the same noise for all. FLOPs x: the original's over "
    "this run's, 2 a multiply-add, everything executed. time x, vect. x: speed-up over the original and over its "
    "vectorised form, medians of ratios within a round. full: steps that ran the whole model. PSNR (dB, all images "
    "together), median (of single images), SSIM: against the original's images. FID, IS, acc (class accuracy): from "
    "the judge, a classifier of the same real images; they compare with each other only. reuse, match: of routed "
    "branches. MB: of cache."
)
DEFAULTS = BenchSettings()


class Study(StrEnum):
    """An ablation of MoECa instead of the comparison."""

    hyperparameters = "hyperparameters"
    score = "score"
    lambdas = "lambdas"


class Bar:
    """Draws what the bench does."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def stage(self, text: str) -> None:
        """A new stage begins."""
        self._progress.update(self._task, description=text[:60])

    def step(self) -> None:
        """One denoising step is done."""
        self._progress.advance(self._task)


def bench(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=HELP)],
    weights: Annotated[str | None, typer.Option(help="Weights: a local file or a hub id.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the reference.")] = DEFAULTS.steps,
    sampler: Annotated[str, typer.Option(help="euler, or ancestral (stochastic).")] = DEFAULTS.sampler,
    batch: Annotated[int, typer.Option(help="Images sampled together.")] = DEFAULTS.batch,
    samples: Annotated[
        int | None, typer.Option(help="Images of each run, a multiple of --batch.", show_default="4 batches")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = DEFAULTS.seed,
    repeats: Annotated[int, typer.Option(help="Timed trajectories of each run.")] = DEFAULTS.repeats,
    policies: Annotated[
        str | None, typer.Option(help="Families or settings to run, e.g. fora,taylorseer N=4.", show_default="all")
    ] = None,
    policy_file: Annotated[
        list[Path] | None, typer.Option(help="A policy file to run as ours; may be repeated.")
    ] = None,
    latency: Annotated[bool, typer.Option(help="Time the runs too, or only judge their images.")] = True,
    figures: Annotated[
        bool, typer.Option(help="Draw reuse, drift and expert maps, which take runs of their own.")
    ] = True,
    study: Annotated[Study | None, typer.Option(help="Run this ablation of MoECa instead.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="1 or 2, whichever is faster")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder; a run that was interrupted goes on there.")] = Path("out/bench"),
) -> None:
    """Compare every policy and its peers on held-out noise and classes: quality, FLOPs, time, memory.

    Finished runs are kept in runs.jsonl in the folder and not repeated; delete it to begin anew.
    """
    settings = BenchSettings(
        steps=steps,
        sampler=sampler,
        batch=batch,
        samples=4 * batch if samples is None else samples,
        seed=seed,
        repeats=repeats,
        threads=1 if threads is None else threads,
    )
    for package in ("numpy", "safetensors", "sklearn", "torchmetrics"):
        require(package, "demo")
    require("matplotlib", "bench")
    from moeca_fx.bench.outputs import compare, fitting_threads, folder_of, run_study
    from moeca_fx.bench.run import Bench
    from moeca_fx.bench.store import Store
    from moeca_fx.bench.subject import Subject
    from moeca_fx.bench.suite import choose, from_files, suite

    ours = from_files(policy_file or [], steps, sampler)
    chosen = choose(suite(steps, settings.stochastic, ours), policies.split(",") if policies is not None else None)
    loaded = load_target(target, weights, batch)
    flow = flow_of(target, loaded.model)
    subject = Subject(target, loaded.model, flow.num_classes, flow.velocity)
    if threads is None:
        settings = replace(settings, threads=fitting_threads(subject, batch))
    store, console = Store(out / "runs.jsonl"), stdout()
    with step_progress() as progress:
        task = progress.add_task("starting", total=None)
        run = Bench(subject, settings, store, Bar(progress, task))
        if study is not None:
            paths = run_study(run, study.value, folder_of(run, out))
        else:
            progress.update(task, total=run.steps_left(chosen, latency))
            result = compare(run, chosen, folder_of(run, out), latency, figures)
            paths = result.paths
    if study is None:
        print_comparison(console, result, settings)
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


def print_comparison(console: Console, result: "Comparison", settings: BenchSettings) -> None:
    """The table of all runs, what was left out, and how far ahead the recommended policies are."""
    from moeca_fx.bench.report import HEADINGS, cells

    table = Table(pad_edge=False, box=None)
    table.add_column(HEADINGS[0], no_wrap=True, min_width=max(len(row.entry.name) for row in result.rows))
    for heading in HEADINGS[1:]:
        table.add_column("\n".join(heading.split()), justify="right", no_wrap=True)
    family = ""
    for row in result.rows:
        if row.quality is None:
            continue
        if family and row.entry.family != family:
            table.add_section()
        family = row.entry.family
        table.add_row(*cells(row), style="bold" if row.entry.group == "ours" else None)
    console.print(table)
    for row in result.rows:
        if row.refused:
            console.print(f"left out: {row.entry.name}: {row.refused}", markup=False, highlight=False, soft_wrap=True)
    for margin in result.margins:
        console.print(describe(margin), markup=False, highlight=False, soft_wrap=True)
    console.print(NOTES.format(settings=settings), highlight=False, style="dim")


def describe(margin: "Margin") -> str:
    """One line about one target."""
    head = f"at {margin.target:g}x fewer FLOPs: best peer {_run(margin.peer, margin.peer_speedup, margin.peer_psnr)}"
    if margin.ours is None:
        return head
    line = f"{head}; {_run(margin.ours, margin.ours_speedup, margin.ours_psnr)}"
    if margin.margin is not None:
        line += f", {margin.margin:+.1f} dB"
    if margin.margin_between is not None:
        line += f" ({margin.margin_between:+.1f} dB between the peers' settings)"
    if margin.margin_median is not None:
        line += f", median image {margin.margin_median:+.1f} dB"
    if margin.fid_change is not None:
        line += f", FID {margin.fid_change:+.2f}"
    return line


def _run(name: str | None, speedup: float | None, psnr: float | None) -> str:
    return "none" if name is None or psnr is None else f"{name} ({speedup:.2f}x, {psnr:.1f} dB)"
