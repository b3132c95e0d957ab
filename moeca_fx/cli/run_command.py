"""``moeca-fx run FOLDER``: sample from an exported model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.cli.classes import parse_classes
from moeca_fx.cli.console import stdout
from moeca_fx.cli.drawing import Source, check_drawing, draw_picture, guided_velocity, prepare_drawing
from moeca_fx.cli.flow import Flow
from moeca_fx.errors import ExportError
from moeca_fx.export import ExportedModel, load
from moeca_fx.export.manifest import dtype_of
from moeca_fx.export.sessions import CPU
from moeca_fx.zoo.sampling import find_sampler


def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What moeca-fx export wrote.")],
    classes: Annotated[str, typer.Option(help="Classes, one sample each, e.g. 0-9 or 3,3,7.")] = "0-9",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    sampler: Annotated[str, typer.Option(help="euler, or ancestral (stochastic).")] = "euler",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none, more costs twice.")] = 1.0,
    provider: Annotated[str, typer.Option(help="onnxruntime's execution provider.")] = CPU,
    strict_provider: Annotated[bool, typer.Option(help="Refuse to run on another provider.")] = True,
    png: Annotated[Path, typer.Option(help="The picture, a PNG file.")] = Path("out/samples.png"),
) -> None:
    """Draw one sample per class from an exported model, run by what it was exported for, as one picture."""
    check_drawing(steps, guidance, png)
    find_sampler(sampler)
    prepare_drawing(png)
    model = load(folder, providers=(provider,), strict_provider=strict_provider)
    manifest = model.manifest
    if manifest.sampler is None:
        raise ExportError(
            f"{folder}: its manifest says nothing of a sampler; run samples the rectified-flow models of the zoo: call "
            "moeca_fx.export.load in your own loop"
        )
    flow = Flow(**manifest.sampler)
    velocity = guided_velocity(flow, guidance, str(folder))
    labels = torch.tensor(parse_classes(classes, flow.num_classes), device=model.device)
    shape = manifest.inputs[0]["shape"][1:]
    noise = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    source = Source(str(folder), "the model that it was exported from")
    seconds = draw_picture(velocity(_in_fp32(model)), noise, labels, steps, png, source, sampler=sampler, seed=seed)
    console = stdout()
    if manifest.cached:
        console.print(str(model.stats()), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(labels)} samples, {steps} steps, {seconds:.1f} s: {png}", highlight=False, soft_wrap=True)


def _in_fp32(model: ExportedModel) -> Callable[..., Any]:
    """The model for a sampler whose latents are fp32, whatever those of the artefact are."""
    dtype = dtype_of(model.manifest.inputs[0]["dtype"])

    def call(x: Tensor, *rest: Tensor) -> Any:
        return pytree.tree_map_only(Tensor, Tensor.float, model(x.to(dtype), *rest))

    return call
