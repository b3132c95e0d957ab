"""``moeca-fx inspect TARGET``: what the compiler finds in a model, what it refuses, which graphs it makes.

Of a folder that ``moeca-fx export`` wrote: what is in it and what it costs (`cli.artefact`).
"""

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import moeca_fx
from moeca_fx.cli.artefact import print_artefact
from moeca_fx.cli.console import stderr, stdout
from moeca_fx.cli.target import HELP, load_target
from moeca_fx.errors import ConfigError, NoMoEFoundError, TargetError
from moeca_fx.export.description import describe_artefact
from moeca_fx.export.manifest import FILE
from moeca_fx.graph.storage import CacheDtype, find_storage
from moeca_fx.inspection import InspectionReport, SiteReport
from moeca_fx.sizes import readable, readable_bytes

_BATCH = 2
KINDS = {"moe": "MoE", "attention": "attention", "dense_ffn": "dense FFN"}


def inspect(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=f"{HELP} Or what moeca-fx export wrote.")],
    weights: Annotated[str | None, typer.Option(help="Weights: a local file or a hub id.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Batch size of the example inputs.", show_default=str(_BATCH))
    ] = None,
    cache_dtype: Annotated[
        str | None, typer.Option(help="Storage of reused vectors: bf16 or fp8.", show_default="the model's")
    ] = None,
    graph: Annotated[
        list[str] | None,
        typer.Option(help="Print the graph of this stage instead; may be repeated; all = every one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
    no_tensorrt: Annotated[
        bool, typer.Option("--no-tensorrt", help="Of an exported ONNX graph: do not ask TensorRT whether it takes it.")
    ] = False,
) -> None:
    """List the sites where a model can reuse work, and every candidate that was refused.

    The column "cached step" says what is computed there: branches (routed ones that changed), synchronized (attention
    of their tokens), rows (of the tokens refreshed before), reuse (nothing), full (everything).

    Of a folder that moeca-fx export wrote: its graphs by operator, what they take and give, what TensorRT refuses of
    them, cache and FLOPs.
    """
    if Path(target, FILE).is_file():
        _refuse_options_of_models(target, weights=weights, batch=batch, cache_dtype=cache_dtype, graph=graph)
        _inspect_artefact(target, as_json, not no_tensorrt)
        return
    if no_tensorrt:
        raise ConfigError(
            f"--no-tensorrt belongs to a folder that moeca-fx export wrote, and TARGET {target!r} is none: it holds no "
            f"{FILE}; drop the option"
        )
    find_storage(cache_dtype)
    loaded = load_target(target, weights, _BATCH if batch is None else batch)
    report = moeca_fx.inspect(loaded.model, loaded.inputs, loaded.kwargs, cache_dtype=cast(CacheDtype, cache_dtype))
    graphs = _chosen_graphs(report, graph or []) if report.sites else {}
    if as_json:
        record = report.as_dict()
        if graphs:
            record["graphs"] = graphs
        typer.echo(json.dumps(record, indent=2, allow_nan=False))
    if not report.sites:
        raise NoMoEFoundError(_why_nothing_found(loaded.text, report))
    if as_json:
        return
    if graphs:
        for stage, text in graphs.items():
            typer.echo(f"# {stage}\n{text}\n")
        return
    _print_report(stdout(), loaded.text, report)
    for warning in report.warnings:
        stderr().print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)


def _refuse_options_of_models(target: str, **options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value != []]
    if given:
        raise ConfigError(
            f"TARGET {target!r} is a folder that moeca-fx export wrote (it holds {FILE}), and {', '.join(given)} "
            f"{'belongs' if len(given) == 1 else 'belong'} to models; drop {'it' if len(given) == 1 else 'them'}"
        )


def _inspect_artefact(folder: str, as_json: bool, tensorrt: bool) -> None:
    found = describe_artefact(folder, tensorrt=tensorrt)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, allow_nan=False))
    else:
        print_artefact(stdout(), folder, found)


def _chosen_graphs(report: InspectionReport, wanted: list[str]) -> dict[str, str]:
    if "all" in wanted:
        return dict(report.graphs)
    for stage in wanted:
        if stage not in report.graphs:
            raise TargetError(f"--graph: no stage is called {stage!r}; known: all, {', '.join(report.graphs)}")
    return {stage: report.graphs[stage] for stage in wanted}


def _why_nothing_found(name: str, report: InspectionReport) -> str:
    candidates = [f"  {paths}: {reason}" for paths, reason in _by_reason(report.refused)]
    looked = ["candidates:", *candidates] if candidates else ["no list of identical modules was found"]
    return "\n".join([f"TARGET {name!r} ({report.model}): {'; '.join(report.warnings)}", *looked])


def _print_report(console: Console, name: str, report: InspectionReport) -> None:
    table = Table(title=f"Sites of {name}", title_justify="left", title_style="bold", pad_edge=False, box=None)
    table.add_column("site", style="cyan", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("cached step", no_wrap=True)
    for heading in ("experts", "top-k", "FLOPs", "cache"):
        table.add_column(heading, justify="right", no_wrap=True)
    for site in report.sites:
        table.add_row(
            Text(site.path),
            KINDS[site.kind],
            "branches" if site.kind == "moe" else site.action,
            _number(site.experts),
            _number(site.top_k),
            f"{100 * site.flops_share:.1f} %",
            readable_bytes(site.cache_bytes),
        )
    console.print(table)
    for form, paths in _by_form(report.sites).items():
        _print_note(console, "MoE ", paths, form)
    for paths, reason in _by_reason(report.refused):
        _print_note(console, "left alone ", paths, reason)
    share = sum(site.flops_share for site in report.sites)
    console.print(
        f"{len(report.sites)} sites hold {100 * share:.1f} % of {readable(report.flops, 'FLOPs')} a full step; "
        f"{readable_bytes(report.cache_bytes)} of cache; batch {report.batch}.",
        highlight=False,
    )


def _print_note(console: Console, label: str, paths: str, text: str) -> None:
    console.print(Text.assemble((label, "bold"), (paths, "cyan"), f": {text}"))


def _by_form(sites: tuple[SiteReport, ...]) -> dict[str, str]:
    """Router and shared expert, which are long and mostly alike -> the MoE sites that have them."""
    forms: dict[str, list[str]] = {}
    for site in sites:
        if site.router is not None:
            shared = f"shared expert {_inside(site.path, site.shared_expert)}" if site.shared_expert else "none shared"
            forms.setdefault(f"router {site.router}; {shared}", []).append(site.path)
    return {form: ", ".join(paths) for form, paths in forms.items()}


def _by_reason(refused: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """(paths, reason), a reason once."""
    reasons: dict[str, list[str]] = {}
    for path, reason in refused:
        reasons.setdefault(reason, []).append(path or "(the model)")
    return [(", ".join(paths), reason) for reason, paths in reasons.items()]


def _inside(site: str, path: str) -> str:
    """`path` seen from the site."""
    return path.removeprefix(f"{site}.")


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
