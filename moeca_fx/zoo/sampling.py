"""Euler sampling of a rectified flow: from noise at t = 0 to data at t = 1 along the predicted velocity."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeca_fx.errors import InputError
from moeca_fx.zoo.digits.config import DIGITS
from moeca_fx.zoo.dsmoe_config import DSMoEConfig


def noise_and_labels(
    batch: int, seed: int, config: DSMoEConfig = DIGITS, classes: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Starting points of a batch of samples.

    Args:
        batch: B.
        seed: of the noise; a private generator on the CPU.
        config: the model's, for the shape and the number of classes.
        classes: labels to take in turn, e.g. ``range(0, 62, 2)``; all of them by default.

    Returns:
        noise [B, C, S, S], standard normal, and labels [B] int64 that cycle over `classes`.

    Raises:
        InputError: `batch` < 1, `classes` is empty or names a class the model does not have.
    """
    if batch < 1:
        raise InputError(f"noise_and_labels: batch must be at least 1, got {batch}")
    cycle = list(range(config.num_classes) if classes is None else classes)
    strangers = [label for label in cycle if not 0 <= label < config.num_classes]
    if not cycle or strangers:
        found = f"found {strangers}" if strangers else "found none"
        raise InputError(f"noise_and_labels: expected classes 0 to {config.num_classes - 1}, {found}")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    return noise, torch.tensor(cycle)[torch.arange(batch) % len(cycle)]


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]],
    noise: Tensor,
    labels: Tensor,
    steps: int = 250,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one image per row of `noise`.

    Args:
        model: called as `model(x, t, y)` once a step with x [B, C, S, S], t [B] float in [0, 1), y [B];
            returns the velocity or a tuple that starts with it. Extra channels beyond C (learned
            sigma) are dropped.
        noise: [B, C, S, S], the state at t = 0.
        labels: [B] int64.
        steps: equal Euler steps to t = 1.
        progress: called after each step as `progress(done, steps)`.

    Returns:
        [B, C, S, S].

    Raises:
        InputError: `steps` < 1, or `noise` and `labels` disagree on the batch.
    """
    if steps < 1:
        raise InputError(f"sample: steps must be at least 1, got {steps}")
    if noise.shape[0] != labels.shape[0]:
        raise InputError(f"sample: noise has batch {noise.shape[0]} but labels have {labels.shape[0]}")
    x = noise.clone()
    for step in range(steps):
        t = torch.full((x.shape[0],), step / steps, dtype=x.dtype, device=x.device)
        output = model(x, t, labels)
        velocity = output if isinstance(output, Tensor) else output[0]
        x = x + velocity[:, : x.shape[1]] / steps
        if progress is not None:
            progress(step + 1, steps)
    return x
