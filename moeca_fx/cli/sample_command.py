"""``moeca-fx sample TARGET``: draw class-conditional samples into a picture."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import moeca_fx
from moeca_fx.cli.classes import parse_classes
from moeca_fx.cli.console import stdout, step_progress
from moeca_fx.cli.flow import Flow, Velocity, flow_of
from moeca_fx.cli.target import HELP, Target, load_target
from moeca_fx.demo.picture import sample_grid
from moeca_fx.errors import ConfigError, InputError, require
from moeca_fx.files import prepare_folder, write_whole
from moeca_fx.policies import Method, Policy, as_method, build, names
from moeca_fx.policies.registry import required_fields
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.options import memory_options
from moeca_fx.zoo.sampling import find_sampler, guided
from moeca_fx.zoo.sampling import sample as draw

COLUMNS = 10
PICTURE_PIXELS = 96
"""Aimed-at side of one sample in the picture."""


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
    if steps < 1:
        raise InputError(f"--steps must be at least 1, found {steps}")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out: expected a file name ending in .png, found {out.name!r}")
    if interval is not None and policy != MOECA:
        raise ConfigError(f"--interval belongs to --policy moeca, found --policy {policy}; drop one of them")
    if not math.isfinite(guidance):
        raise InputError(f"--guidance must be a finite number, found {guidance}")
    find_sampler(sampler)
    memory = _memory_options(policy, cache_dtype=cache_dtype, cache_limit=cache_limit, chunk=chunk)
    method = _method(policy, interval, steps)
    if isinstance(method, Method):
        method.check_run(steps, sampler)
    require("PIL", "demo")
    prepare_folder(out.parent)

    loaded = load_target(target, weights)
    flow = flow_of(target, loaded.model)
    velocity = _velocity(flow, guidance, target)
    labels = torch.tensor(parse_classes(classes, flow.num_classes))
    noise = torch.randn(len(labels), *loaded.inputs[0].shape[1:], generator=torch.Generator().manual_seed(seed))
    inputs = (noise, torch.zeros(len(labels)), labels)
    model = _transformed(loaded, policy, method, inputs, {**memory, "compile": compile})

    start = time.perf_counter()
    with step_progress() as progress:
        bar = progress.add_task(f"sampling {target}", total=steps)

        def advance(done: int, _: int) -> None:
            progress.update(bar, completed=done)

        images = draw(velocity(model), noise, labels, steps, advance, sampler=sampler, seed=seed)
    seconds = time.perf_counter() - start
    if not torch.isfinite(images).all():
        raise InputError(
            f"TARGET {target!r}: its samples hold NaN or infinity, no picture was written; check its weights"
        )

    zoom = max(1, PICTURE_PIXELS // images.shape[-1])
    write_whole(out, sample_grid(images, COLUMNS, zoom).save)
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


def _velocity(flow: Flow, guidance: float, target: str) -> Callable[[nn.Module], Velocity]:
    """From the model to its velocity, guided if that is asked for."""
    null = flow.null_class
    if guidance == 1:
        return flow.velocity
    if null is None:
        raise InputError(f"--guidance: TARGET {target!r} has no unconditional class to guide by; leave it at 1")
    return lambda model: guided(flow.velocity(model), guidance, null)


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
