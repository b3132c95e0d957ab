"""``moeca-fx sample TARGET``: draw class-conditional samples into a picture."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import moeca_fx
from moeca_fx.cli.classes import parse_classes
from moeca_fx.cli.console import stdout
from moeca_fx.cli.drawing import Source, check_drawing, draw_picture, guided_velocity, prepare_drawing
from moeca_fx.cli.flow import flow_of
from moeca_fx.cli.target import HELP, Target, load_target
from moeca_fx.errors import ConfigError
from moeca_fx.policies import Method, Policy, as_method, build, names
from moeca_fx.policies.registry import required_fields
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.options import memory_options
from moeca_fx.zoo.sampling import find_sampler

ORIGINAL, NONE, MOECA = "original", "none", "moeca"


def sample(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=HELP)],
    weights: Annotated[str | None, typer.Option(help="Weights: a local file or a hub id.")] = None,
    classes: Annotated[str, typer.Option(help="Classes, one sample each, e.g. 0-9 or 3,3,7.")] = "0-9",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    policy: Annotated[
        str,
        typer.Option(help="A policy's name or YAML file; none: vectorised without a cache; original: as it is."),
    ] = MOECA,
    sampler: Annotated[str, typer.Option(help="euler, or ancestral (stochastic).")] = "euler",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none, more costs twice.")] = 1.0,
    interval: Annotated[
        int | None, typer.Option(help="Cycle length of moeca: every n-th step is full.", show_default="4")
    ] = None,
    cache_dtype: Annotated[
        str | None, typer.Option(help="Storage of reused vectors: bf16 or fp8.", show_default="the model's")
    ] = None,
    cache_limit: Annotated[
        str | None, typer.Option(help="Largest cache, e.g. 500MB; samples beyond it are computed in full.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Most samples that are computed at once.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the model first, a minute; worth it for many images.")] = False,
    out: Annotated[Path, typer.Option(help="The picture, a PNG file.")] = Path("out/samples.png"),
) -> None:
    """Draw one sample per class and write them as one picture; latents are drawn as they are, not decoded."""
    check_drawing(steps, guidance, out)
    if interval is not None and policy != MOECA:
        raise ConfigError(f"--interval belongs to --policy moeca, found --policy {policy}; drop one of them")
    find_sampler(sampler)
    memory = _memory_options(policy, cache_dtype=cache_dtype, cache_limit=cache_limit, chunk=chunk)
    method = _method(policy, interval, steps)
    if isinstance(method, Method):
        method.check_run(steps, sampler)
    prepare_drawing(out)

    loaded = load_target(target, weights)
    flow = flow_of(target, loaded.model)
    velocity = guided_velocity(flow, guidance, f"TARGET {target!r}")
    labels = torch.tensor(parse_classes(classes, flow.num_classes))
    noise = torch.randn(len(labels), *loaded.inputs[0].shape[1:], generator=torch.Generator().manual_seed(seed))
    inputs = (noise, torch.zeros(len(labels)), labels)
    model = _transformed(loaded, policy, method, inputs, {**memory, "compile": compile})

    source = Source(f"TARGET {target!r}", "its weights")
    seconds = draw_picture(velocity(model), noise, labels, steps, out, source, sampler=sampler, seed=seed)
    console = stdout()
    if isinstance(model, TransformedModel) and method is not None:
        console.print(str(model.stats()), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(labels)} samples, {steps} steps, {seconds:.1f} s, {policy}: {out}",
        highlight=False,
        soft_wrap=True,
    )


def _method(policy: str, interval: int | None, steps: int) -> Method | Policy | None:
    """What `--policy` names; None for the two that cache nothing. A method that must know the steps is told."""
    if policy in (ORIGINAL, NONE):
        return None
    if interval is not None:
        return moeca_fx.MoECa(interval=interval)
    if policy in names() and "steps" in required_fields(policy):
        return build(policy, steps=steps)
    return as_method(policy)


def _memory_options(policy: str, **options: Any) -> dict[str, Any]:
    """What `transform` takes, checked before the model is loaded."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given and policy == ORIGINAL:
        raise ConfigError(f"{given[0]} belongs to a transformed model, found --policy {policy}; drop one of them")
    memory_options(**options)
    return options


def _transformed(
    loaded: Target,
    policy: str,
    method: Method | Policy | None,
    inputs: tuple[torch.Tensor, ...],
    options: dict[str, Any],
) -> nn.Module:
    if policy == ORIGINAL:
        return loaded.model
    return moeca_fx.transform(loaded.model, example_inputs=inputs, policy=method, **options)
