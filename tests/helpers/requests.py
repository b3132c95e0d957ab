"""Requests to the tiny pipelines, each from noise of its own seed."""

from typing import Any

import torch
from diffusers import DiTPipeline
from torch import Tensor

from moeca_fx import MoECa
from tests.helpers.pipelines import TextPipeline, prompts

SOME = MoECa(interval=4, tau0=0.6)  # a full step in four; of the others' branches, a part is recomputed


def noise(seed: int = 0) -> torch.Generator:
    """Where a request's noise comes from."""
    return torch.Generator().manual_seed(seed)


def draw(pipe: DiTPipeline, steps: int = 6, seed: int = 0, labels: tuple[int, ...] = (1, 2), **more: Any) -> Tensor:
    """Images of a class-conditional pipeline, [B, 3, H, W]."""
    images: Tensor = pipe(
        class_labels=list(labels), num_inference_steps=steps, generator=noise(seed), output_type="pt", **more
    ).images
    return images


def write(pipe: TextPipeline, steps: int = 6, seed: int = 0, batch: int = 1, **more: Any) -> Tensor:
    """Latents of the pipeline with separate guidance, [B, C, H, W]."""
    given = prompts(batch, seed) | more
    latents: Tensor = pipe(num_inference_steps=steps, generator=noise(seed), **given)[0]
    return latents
