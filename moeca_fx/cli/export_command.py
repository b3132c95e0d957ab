"""``moeca-fx export TARGET``: write a model with its caches as ONNX, proven against PyTorch."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moeca_fx.cli.console import stderr, stdout
from moeca_fx.cli.flow import find_flow
from moeca_fx.cli.target import HELP, load_target
from moeca_fx.errors import ConfigError
from moeca_fx.export import to_onnx
from moeca_fx.export.manifest import FILE
from moeca_fx.export.onnx_file import OPSET
from moeca_fx.policies import as_method


class Format(StrEnum):
    """What can be written."""

    ONNX = "onnx"


NONE = "none"


def export(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=HELP)],
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.ONNX,
    weights: Annotated[str | None, typer.Option(help="Weights: a local file or a hub id.")] = None,
    batch: Annotated[str, typer.Option(help="Samples of a call: least,best,most, or one number.")] = "1,8,32",
    policy: Annotated[str, typer.Option(help="moeca, a YAML file of it, or none: without caches.")] = "moeca",
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = OPSET,
    external_data: Annotated[bool, typer.Option(help="Weights in a file of their own.")] = True,
    verify: Annotated[bool, typer.Option(help="Run it against PyTorch before it is done.")] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder; gets the artefact and its manifest.")] = Path(
        "out/export"
    ),
) -> None:
    """Export a model with its caches as inputs and outputs; `moeca-fx run` samples from what is written."""
    sizes = _sizes(batch)
    method = None if policy == NONE else as_method(policy)
    loaded = load_target(target, weights)
    flow = find_flow(loaded.model)
    progress = stderr()
    manifest = to_onnx(
        loaded.model,
        out,
        loaded.inputs,
        loaded.kwargs,
        method,  # type: ignore[arg-type]  # a policy of parts is refused there
        batch=sizes,
        opset=opset,
        external_data=external_data,
        check=verify,
        sampler=None if flow is None else asdict(flow),
        progress=lambda stage: progress.print(f"{stage} ...", highlight=False),
    )
    cache = sum(item["bytes_per_sample"] for item in manifest.caches)
    stdout().print(
        f"{out / manifest.file}: batches of {sizes[0]} to {sizes[2]}, {len(manifest.caches)} caches of "
        f"{cache / 2**20:.1f} MiB a sample; {out / FILE} describes it",
        highlight=False,
        soft_wrap=True,
    )


def _sizes(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--batch: expected least,best,most such as 1,8,32, or one number, found {text!r}") from error
    return found * 3 if len(found) == 1 else found
