"""``moeca-fx doctor TARGET``: run every stage, show where it stopped, the evidence, and what to do."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moeca_fx.cli.console import stderr
from moeca_fx.cli.target import HELP, load_target
from moeca_fx.diagnosis import doctor as diagnose
from moeca_fx.registry import load

STOPPED = 1
"""Exit code of a model that does not transform; a wrong TARGET or option exits with 2, as everywhere."""


def doctor(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=HELP)],
    weights: Annotated[str | None, typer.Option(help="Weights: a local file or a hub id.")] = None,
    batch: Annotated[int, typer.Option(help="Batch size of the example inputs.")] = 2,
    entry: Annotated[
        list[Path] | None, typer.Option(help="Register the entry of this Python file first; may be repeated.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the steps too: tens of seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Run every stage of a transformation and tell where it stopped and what to do.

    Shows every candidate for experts: what holds them, the router, the proofs that were tried, the nearest miss.

    Exit codes: 0 the whole model transforms, 1 it stops (the reason is shown), 2 a wrong TARGET or option.
    """
    loaded = load_target(target, weights, batch)
    for path in entry or []:
        load(path)
    stderr().print(f"diagnosing {target}: discovery, tracing, {'compiled ' if compile else ''}steps", style="dim")
    report = diagnose(loaded.model, loaded.inputs, loaded.kwargs, compile=compile)
    typer.echo(json.dumps(report.as_dict(), indent=2, allow_nan=False) if as_json else str(report))
    if not report.ok:
        raise typer.Exit(STOPPED)
