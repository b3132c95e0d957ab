"""From a velocity to a picture of samples: what ``sample`` and ``run`` share."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_fx.cli.console import step_progress
from moeca_fx.cli.flow import Flow, Velocity
from moeca_fx.demo.picture import sample_grid
from moeca_fx.errors import InputError, require
from moeca_fx.files import prepare_folder, write_whole
from moeca_fx.zoo.sampling import guided
from moeca_fx.zoo.sampling import sample as draw

COLUMNS = 10
PICTURE_PIXELS = 96
"""Aimed-at side of one sample in the picture."""


@dataclass(frozen=True)
class Source:
    """What samples are drawn from, for messages: its name, and what to check when it gives no numbers."""

    name: str
    suspect: str


def check_drawing(steps: int, guidance: float, out: Path) -> None:
    """Raise `InputError` for options that no picture can come from."""
    if steps < 1:
        raise InputError(f"--steps must be at least 1, found {steps}")
    if out.suffix.lower() != ".png":
        raise InputError(f"expected a file name ending in .png for the picture, found {out.name!r}")
    if not math.isfinite(guidance):
        raise InputError(f"--guidance must be a finite number, found {guidance}")


def prepare_drawing(out: Path) -> None:
    """Raise before long work when the picture could not be written."""
    require("PIL", "demo")
    prepare_folder(out.parent)


def guided_velocity(flow: Flow, guidance: float, name: str) -> Callable[[Callable[..., Any]], Velocity]:
    """From the model to its velocity, guided if that is asked for."""
    null = flow.null_class
    if guidance == 1:
        return flow.velocity
    if null is None:
        raise InputError(f"--guidance: {name} has no unconditional class to guide by; leave it at 1")
    return lambda model: guided(flow.velocity(model), guidance, null)


def draw_picture(
    velocity: Velocity,
    noise: Tensor,
    labels: Tensor,
    steps: int,
    out: Path,
    source: Source,
    *,
    sampler: str = "euler",
    seed: int = 0,
) -> float:
    """Denoise with a progress bar and write one picture of all samples; the seconds that denoising took."""
    start = time.perf_counter()
    with step_progress() as progress:
        bar = progress.add_task(f"sampling {source.name}", total=steps)

        def advance(done: int, _: int) -> None:
            progress.update(bar, completed=done)

        images = draw(velocity, noise, labels, steps, advance, sampler=sampler, seed=seed).cpu()
    seconds = time.perf_counter() - start
    if not torch.isfinite(images).all():
        raise InputError(
            f"{source.name}: its samples hold NaN or infinity, no picture was written; check {source.suspect}"
        )
    zoom = max(1, PICTURE_PIXELS // images.shape[-1])
    write_whole(out, sample_grid(images, COLUMNS, zoom).save)
    return seconds
