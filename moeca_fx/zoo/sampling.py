"""Sampling of a rectified flow, from noise at t = 0 to data at t = 1: Euler, and an ancestral (DDPM-like) sampler.

A sampler is one rule that takes the state from t to s; the rules share one loop and sit in `SAMPLERS`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_fx.errors import ConfigError, InputError
from moeca_fx.zoo.digits.config import DIGITS
from moeca_fx.zoo.dsmoe_config import DSMoEConfig

FRESH_NOISE = 1_000_003
"""Added to the seed of fresh noise, so that it differs from starting noise drawn with the same seed."""


@dataclass(frozen=True)
class Sampler:
    """How a state at t = i/n becomes one at s = (i+1)/n.

    Attributes:
        name: what users call it.
        stochastic: whether it draws fresh noise, and so depends on the seed.
        advance: called as `advance(x, velocity, noise, i, n)`, tensors [B, C, S, S]; `noise` is standard normal when
            `stochastic` and i < n - 1, else None. Returns the next state.
    """

    name: str
    stochastic: bool
    advance: Callable[[Tensor, Tensor, Tensor | None, int, int], Tensor]


def _euler(x: Tensor, velocity: Tensor, noise: Tensor | None, i: int, n: int) -> Tensor:
    return x + velocity / n


def _ancestral(x: Tensor, velocity: Tensor, noise: Tensor | None, i: int, n: int) -> Tensor:
    """DDPM's posterior (arXiv 2006.11239, equations 6 and 7) for alpha = t, sigma = 1 - t.

    With SNR = (alpha / sigma)^2 the fresh noise has variance tau^2 = sigma_s^2 (1 - SNR_t / SNR_s), and
    x_s = alpha_s D + sqrt(sigma_s^2 - tau^2) N + tau noise, where D and N are the predicted data and noise.
    """
    t, s = i / n, (i + 1) / n
    data = x + (1 - t) * velocity
    if noise is None:
        return data
    kept = i * (n - i - 1) / ((i + 1) * (n - i))  # sqrt(SNR_t / SNR_s)
    predicted = x - t * velocity
    return s * data + (1 - s) * (kept * predicted + math.sqrt(1 - kept**2) * noise)


SAMPLERS: dict[str, Sampler] = {
    each.name: each for each in (Sampler("euler", False, _euler), Sampler("ancestral", True, _ancestral))
}


def find_sampler(name: str) -> Sampler:
    """The sampler of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"no sampler is called {name!r}; samplers: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


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


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]], scale: float, null_class: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Classifier-free guidance (arXiv 2207.12598) for `sample`: v_null + scale * (v_class - v_null).

    Each step is one call with a batch of twice the size, wanted classes first, then the null class.

    Args:
        model: as for `sample`; a velocity alone or a tuple that starts with it.
        scale: 1 is no guidance and costs no second half.
        null_class: label of the model's unconditional class.
    """

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if scale == 1:
            return velocity_of(model(x, t, y), x)
        labels = torch.cat([y, torch.full_like(y, null_class)])
        wanted, free = velocity_of(model(torch.cat([x, x]), torch.cat([t, t]), labels), x).chunk(2)
        return free + scale * (wanted - free)

    return call


def velocity_of(output: Tensor | tuple[Tensor, ...], x: Tensor) -> Tensor:
    """The velocity in what a model returned for `x`: the (first) tensor, without channels beyond those of `x`."""
    return (output if isinstance(output, Tensor) else output[0])[:, : x.shape[1]]


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]],
    noise: Tensor,
    labels: Tensor,
    steps: int = 250,
    progress: Callable[[int, int], None] | None = None,
    *,
    sampler: str = "euler",
    seed: int = 0,
) -> Tensor:
    """Draw one image per row of `noise`.

    Args:
        model: called as `model(x, t, y)` once a step with x [B, C, S, S], t [B] float in [0, 1), y [B];
            returns the velocity or a tuple that starts with it. Extra channels beyond C (learned
            sigma) are dropped.
        noise: [B, C, S, S], the state at t = 0.
        labels: [B] int64.
        steps: equal steps to t = 1.
        progress: called after each step as `progress(done, steps)`.
        sampler: one of `SAMPLERS`.
        seed: of a stochastic sampler's fresh noise: a private generator on the CPU, one draw of `noise`'s shape a
            step, whatever the model returns. Chunks of one batch want different seeds.

    Returns:
        [B, C, S, S].

    Raises:
        InputError: `steps` < 1, or `noise` and `labels` disagree on the batch.
        ConfigError: there is no such sampler.
    """
    chosen = find_sampler(sampler)
    if steps < 1:
        raise InputError(f"sample: steps must be at least 1, got {steps}")
    if noise.shape[0] != labels.shape[0]:
        raise InputError(f"sample: noise has batch {noise.shape[0]} but labels have {labels.shape[0]}")
    generator = torch.Generator().manual_seed(seed + FRESH_NOISE)
    x = noise.clone()
    for step in range(steps):
        t = torch.full((x.shape[0],), step / steps, dtype=x.dtype, device=x.device)
        velocity = velocity_of(model(x, t, labels), x)
        draws = chosen.stochastic and step < steps - 1
        fresh = torch.randn(x.shape, generator=generator).to(x) if draws else None
        x = chosen.advance(x, velocity, fresh, step, steps)
        if progress is not None:
            progress(step + 1, steps)
    return x
