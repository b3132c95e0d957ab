"""``moeca-fx export TARGET``: write a model with its caches as ONNX, an engine, a torch program or a package."""

from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moeca_fx.cli.console import stderr, stdout
from moeca_fx.cli.flow import find_flow
from moeca_fx.cli.target import HELP, load_target
from moeca_fx.errors import ConfigError
from moeca_fx.export import Manifest, to_aotinductor, to_onnx, to_pt2, to_tensorrt
from moeca_fx.export.engine import parse_capabilities
from moeca_fx.export.manifest import FILE
from moeca_fx.export.onnx.file import OPSET
from moeca_fx.policies import as_method
from moeca_fx.sizes import parse_bytes


class Format(StrEnum):
    """What can be written."""

    ONNX = "onnx"
    TENSORRT = "tensorrt"
    PT2 = "pt2"
    AOTI = "aoti"


class Graphs(StrEnum):
    """One graph for all steps, or one a step."""

    AUTO = "auto"
    ONE = "one"
    STEPS = "steps"


class ExpertsForm(StrEnum):
    """How experts compute."""

    AUTO = "auto"
    PADDED = "padded"
    UNROLLED = "unrolled"
    DENSE = "dense"


class LengthsForm(StrEnum):
    """How long lists are that depend on data."""

    AUTO = "auto"
    RANGE = "range"
    NONZERO = "nonzero"
    INPUT = "input"


class Dtype(StrEnum):
    """What a copy of the model is cast to."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


NONE = "none"


def export(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=HELP)],
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.ONNX,
    weights: Annotated[str | None, typer.Option(help="Weights: a local file or a hub id.")] = None,
    batch: Annotated[str, typer.Option(help="Samples of a call: least,best,most, or one number.")] = "1,8,32",
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the model; by default it stays as it is.")] = None,
    policy: Annotated[str, typer.Option(help="A policy, a YAML file of one, or none: without caches.")] = "moeca",
    graphs: Annotated[
        Graphs, typer.Option(help="One graph for full and cached steps (weights once), or one a step.")
    ] = Graphs.AUTO,
    experts: Annotated[
        ExpertsForm,
        typer.Option(help="One product over padded groups, one an expert (onnx, its default), or all on every row."),
    ] = ExpertsForm.AUTO,
    lengths: Annotated[
        LengthsForm,
        typer.Option(
            help="Lists of exact length (nonzero, onnx's default), bounded (range, tensorrt's), or given (input)."
        ),
    ] = LengthsForm.AUTO,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = OPSET,
    external_data: Annotated[bool, typer.Option(help="ONNX: weights in a file of their own.")] = True,
    backend: Annotated[str, typer.Option(help="Of engines: tensorrt, tensorrt-rtx, or auto.")] = "auto",
    compute_capability: Annotated[
        str, typer.Option(help="Of engines for other GPUs than the one here, e.g. 89,120 (tensorrt-rtx).")
    ] = "",
    workspace: Annotated[str | None, typer.Option(help="Most scratch memory of an engine, e.g. 2GB.")] = None,
    verify: Annotated[bool, typer.Option(help="Run it against PyTorch before it is done.")] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder; gets the artefact and its manifest.")] = Path(
        "out/export"
    ),
) -> None:
    """Export a model with its caches as inputs and outputs; `moeca-fx run` samples from what is written."""
    sizes = _sizes(batch)
    method = None if policy == NONE else as_method(policy)
    console = stderr()
    if format is not Format.TENSORRT and (compute_capability or workspace is not None or backend != "auto"):
        raise ConfigError("--backend, --compute-capability and --workspace belong to --format tensorrt; drop them")
    if format not in (Format.ONNX, Format.TENSORRT) and lengths is not LengthsForm.AUTO:
        raise ConfigError("--lengths belongs to --format onnx and tensorrt; drop it")
    write: Callable[..., Manifest] = to_aotinductor
    forms: dict[str, Any] = {"graphs": graphs.value}
    if experts is not ExpertsForm.AUTO:
        forms["experts"] = experts.value
    if format is Format.TENSORRT:
        write = partial(
            to_tensorrt,
            **forms,
            lengths="range" if lengths is LengthsForm.AUTO else lengths.value,  # type: ignore[arg-type]  # checked there
            opset=opset,
            backend=backend,  # type: ignore[arg-type]  # checked there
            compute_capabilities=parse_capabilities(compute_capability),
            workspace=None if workspace is None else _bytes(workspace),
            steps=_EngineBar(console),
        )
    elif format is Format.ONNX:
        write = partial(to_onnx, **forms, lengths=lengths.value, opset=opset, external_data=external_data)
    elif format is Format.PT2:
        write = partial(to_pt2, **forms)
    elif graphs is not Graphs.AUTO or experts is not ExpertsForm.AUTO:
        raise ConfigError("--graphs and --experts: AOTInductor compiles a graph a step with its kernels; drop them")
    loaded = load_target(target, weights)
    flow = find_flow(loaded.model)
    manifest = write(
        loaded.model,
        out,
        loaded.inputs,
        loaded.kwargs,
        method,
        batch=sizes,
        dtype=None if dtype is None else dtype.value,
        check=verify,
        sampler=None if flow is None else asdict(flow),
        progress=lambda stage: console.print(f"{stage} ...", highlight=False),
    )
    cache = sum(item["bytes_per_sample"] for item in manifest.caches)
    stdout().print(
        f"{', '.join(str(out / graph['file']) for graph in manifest.graphs)}: batches of {sizes[0]} to {sizes[2]}, "
        f"{len(manifest.caches)} caches of "
        f"{cache / 2**20:.1f} MiB a sample; {out / FILE} describes it",
        highlight=False,
        soft_wrap=True,
    )


class _EngineBar:
    """One line a phase of TensorRT's build, at its beginning and every tenth."""

    def __init__(self, console: Console) -> None:
        self.console, self.said = console, ""

    def __call__(self, phase: str, done: int, total: int) -> bool:
        """Always goes on: Ctrl-C cancels."""
        line = f"  {phase}: {10 * done // max(total, 1) * 10} %"
        if line != self.said:
            self.said = line
            self.console.print(line, highlight=False)
        return True


def _bytes(text: str) -> int:
    size = parse_bytes(text)
    if size is None:
        raise ConfigError(f"--workspace: expected a size such as 2GB, found {text!r}")
    return int(size)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--batch: expected least,best,most such as 1,8,32, or one number, found {text!r}") from error
    return found * 3 if len(found) == 1 else found
