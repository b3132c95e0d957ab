"""``moeca-fx inspect TARGET``: what the compiler finds in a model, what it refuses, which graphs it makes."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import moeca_fx
from moeca_fx.cli.console import stderr, stdout
from moeca_fx.cli.target import HELP, load_target
from moeca_fx.errors import TargetError
from moeca_fx.inspection import InspectionReport

KINDS = {"moe": "MoE", "attention": "attention", "dense_ffn": "dense FFN"}


def inspect(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=HELP)],
    weights: Annotated[str | None, typer.Option(help="Weights: a local file or a hub id.")] = None,
    batch: Annotated[int, typer.Option(help="Batch size of the example inputs.")] = 2,
    graph: Annotated[
        list[str] | None,
        typer.Option(help="Print the graph of this stage instead; may be repeated; all = every one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """List the sites where a model can reuse work, and every candidate that was refused."""
    loaded = load_target(target, weights, batch)
    report = moeca_fx.inspect(loaded.model, loaded.inputs, loaded.kwargs)
    graphs = _chosen_graphs(report, graph or [])
    if as_json:
        record = report.as_dict()
        if graphs:
            record["graphs"] = graphs
        typer.echo(json.dumps(record, indent=2, allow_nan=False))
        return
    if graphs:
        for stage, text in graphs.items():
            typer.echo(f"# {stage}\n{text}\n")
        return
    _print_report(stdout(), loaded.text, report)
    for warning in report.warnings:
        stderr().print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)


def _chosen_graphs(report: InspectionReport, wanted: list[str]) -> dict[str, str]:
    if "all" in wanted:
        return dict(report.graphs)
    for stage in wanted:
        if stage not in report.graphs:
            raise TargetError(f"--graph: no stage is called {stage!r}; known: all, {', '.join(report.graphs)}")
    return {stage: report.graphs[stage] for stage in wanted}


def _print_report(console: Console, name: str, report: InspectionReport) -> None:
    table = Table(title=f"Sites of {name}", title_justify="left", title_style="bold", pad_edge=False, box=None)
    table.add_column("path", style="cyan", overflow="fold")
    table.add_column("kind")
    for heading in ("experts", "k"):
        table.add_column(heading, justify="right")
    table.add_column("router", overflow="fold")
    table.add_column("shared expert", overflow="fold")
    for heading in ("FLOPs %", "cache"):
        table.add_column(heading, justify="right", no_wrap=True)
    for site in report.sites:
        table.add_row(
            Text(site.path),
            KINDS[site.kind],
            _number(site.experts),
            _number(site.top_k),
            Text(site.router or ""),
            Text(site.shared_expert or ""),
            f"{100 * site.flops_share:.1f}",
            readable_bytes(site.cache_bytes),
        )
    console.print(table)
    flops = sum(site.flops for site in report.sites)
    cache = sum(site.cache_bytes for site in report.sites)
    share = sum(site.flops_share for site in report.sites)
    console.print(
        f"{len(report.sites)} sites, {flops / 1e9:.3f} GFLOPs a call ({100 * share:.1f} % of the model's), "
        f"{readable_bytes(cache)} of cache",
        highlight=False,
    )
    for path, reason in report.refused:
        console.print(Text.assemble(("refused ", "bold yellow"), (path, "cyan"), f": {reason}"), soft_wrap=True)


def readable_bytes(count: int) -> str:
    """Bytes in decimal units, three digits: ``"12.3 MB"``."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
