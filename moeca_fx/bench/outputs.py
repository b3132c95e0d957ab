"""From runs to files: the comparison with its figures, and the studies; each file whole or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from moeca_fx import policies
from moeca_fx.bench.entries import Entry
from moeca_fx.bench.margins import Margin, margins
from moeca_fx.bench.plots.activation import plot_activation
from moeca_fx.bench.plots.drift import plot_drift
from moeca_fx.bench.plots.hyperparameters import plot_hyperparameters
from moeca_fx.bench.plots.lambdas import plot_lambdas
from moeca_fx.bench.plots.reuse import plot_reuse
from moeca_fx.bench.plots.score import plot_score
from moeca_fx.bench.plots.tradeoff import plot_flops, plot_latency
from moeca_fx.bench.report import document, ordered, write_numbers
from moeca_fx.bench.run import Bench, Row
from moeca_fx.bench.studies import TAU0S, hyperparameter_entries, lambda_entries, rows_of, score_study
from moeca_fx.bench.subject import Subject
from moeca_fx.bench.traces import trace_drift, trace_reuse, trace_routing
from moeca_fx.timing import fastest_threads, most_threads, pinned_threads

TRACED_SAMPLES = 8
TRACED_TAU0S = (0.8, 0.4, 0.2)
TRIAL_STEPS = 4


@dataclass(frozen=True)
class Comparison:
    """What a bench run found, and the files it is in."""

    rows: list[Row]
    margins: list[Margin]
    paths: list[Path]


def fitting_threads(subject: Subject, batch: int) -> int:
    """How many CPU threads make the original fastest now."""
    noise = torch.zeros(batch, *subject.example(1)[0].shape[1:])
    labels, velocity = torch.zeros(batch, dtype=torch.int64), subject.velocity(subject.model)

    def trial() -> None:
        with torch.no_grad():
            for step in range(TRIAL_STEPS):
                velocity(noise, torch.full((batch,), step / TRIAL_STEPS), labels)

    return fastest_threads(trial, most_threads())


def compare(bench: Bench, entries: Sequence[Entry], folder: Path, latency: bool, figures: bool) -> Comparison:
    """Run these entries and write numbers and figures into `folder`.

    Args:
        latency: time them too.
        figures: trace reuse, drift and routing in runs of their own and draw them.

    Raises:
        MoecaError: the file system refused, a run did not repeat itself, or an extra is missing.
    """
    rows = ordered(bench.run(entries, latency))
    title = title_of(bench)
    paths = list(write_numbers(document(rows, bench.subject, bench.settings), folder))
    paths.append(plot_flops(rows, title, folder / "quality_vs_flops.png"))
    timed = plot_latency(rows, title, folder / "quality_vs_latency.png")
    if timed is not None:
        paths.append(timed)
    if figures:
        with pinned_threads(bench.settings.threads):
            paths += trace_figures(bench, folder)
    return Comparison(rows, margins(rows), paths)


def trace_figures(bench: Bench, folder: Path) -> list[Path]:
    """Reuse over match, drift and expert maps, from a few samples."""
    few = min(TRACED_SAMPLES, bench.settings.batch)
    settings, title = replace(bench.settings, batch=few, samples=few), title_of(bench)
    methods = {f"tau0={tau0:g}": policies.build("moeca", tau0=tau0) for tau0 in TRACED_TAU0S}
    bench.watch.stage("tracing reuse")
    reuse = {name: trace_reuse(bench.subject, settings, method) for name, method in methods.items()}
    bench.watch.stage("tracing drift and routing")
    drift, routing = trace_drift(bench.subject, settings), trace_routing(bench.subject, settings)
    maps = [plot_activation(trace, title, folder / f"experts-{trace.path}.png") for trace in routing]
    return [plot_reuse(reuse, title, folder / "reuse.png"), plot_drift(drift, title, folder / "drift.png"), *maps]


def run_study(bench: Bench, name: str, folder: Path) -> list[Path]:
    """One of the paper's ablations: its numbers and its figure.

    Args:
        name: ``"hyperparameters"``, ``"score"`` or ``"lambdas"``.

    Raises:
        MoecaError: the file system refused, or an extra is missing.
    """
    bench.watch.stage(name)
    write = partial(_write_study, bench, folder)
    title = title_of(bench)
    with pinned_threads(bench.settings.threads):
        if name == "hyperparameters":
            rows = rows_of(bench, hyperparameter_entries())
            return [*write(name, rows), plot_hyperparameters(rows, title, folder / f"study-{name}.png")]
        if name == "score":
            results = score_study(bench)
            figure = plot_score(results, title, folder / f"study-{name}.png")
            return [*write(name, [result.row for result in results]), figure]
        paths: list[Path] = []
        for tau0 in TAU0S:
            rows, stem = rows_of(bench, lambda_entries(tau0)), f"{name}-tau0-{tau0:g}"
            paths += write(stem, rows)
            paths.append(plot_lambdas(rows, f"{title}, tau0 = {tau0:g}", folder / f"study-{stem}.png"))
        return paths


def title_of(bench: Bench) -> str:
    """What every figure of a run says on top."""
    return f"{bench.subject.name}, {bench.settings.steps} {bench.settings.sampler} steps"


def folder_of(bench: Bench, out: Path) -> Path:
    """Where the files of a run go, beside other targets, samplers and step counts."""
    name = bench.subject.name.replace(":", "-").replace("/", "-")
    return out / f"{name}-{bench.settings.sampler}-{bench.settings.steps}"


def _write_study(bench: Bench, folder: Path, name: str, rows: Sequence[Row]) -> tuple[Path, Path]:
    return write_numbers(document(rows, bench.subject, bench.settings), folder, f"study-{name}")
