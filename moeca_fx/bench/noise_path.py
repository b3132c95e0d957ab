"""The same noise for a stochastic sampler with fewer steps.

Fewer steps with noise of their own end at other images, however good they are. With alpha = t, sigma = 1 - t and
SNR = (alpha / sigma)^2 the ancestral sampler is a Brownian motion in SNR: where D is the predicted data and
u = (x / alpha - D) SNR, a step from t to s gives u_s = u_t + sqrt(SNR_s - SNR_t) noise. So the noise of one long step
is the sum of the noises of the short steps it covers, each with the root of its own increment, divided by the root
of the whole.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moeca_fx.errors import InputError
from moeca_fx.zoo.sampling import FRESH_NOISE


def coarse_steps(steps: int, path_steps: int) -> tuple[int, ...]:
    """Where `steps` steps begin on a trajectory of `path_steps`, as evenly as its grid allows; 0 is the first.

    Raises:
        InputError: `steps` is not between 1 and `path_steps`.
    """
    if not 1 <= steps <= path_steps:
        raise InputError(f"coarse_steps: expected 1 to {path_steps} steps, found {steps}")
    return tuple(round(step * path_steps / steps) for step in range(steps))


def coarse_noise(like: Tensor, begins: Sequence[int], path_steps: int, seed: int) -> list[Tensor]:
    """Fresh noise of each long step, along the path that `moeca_fx.zoo.sampling.sample` takes with this seed.

    Args:
        like: the starting noise, [B, C, S, S].
        begins: rising from 0, as `coarse_steps` gives them.
        path_steps: steps of that path.
        seed: of its fresh noise.

    Returns:
        For each long step a tensor like `like`, standard normal; zero for the last, which draws none.
    """
    generator = torch.Generator().manual_seed(seed + FRESH_NOISE)
    longs = []
    for begin, end in zip(begins, [*begins[1:], path_steps], strict=True):
        if end == path_steps:
            longs.append(torch.zeros_like(like))
            continue
        total = torch.zeros_like(like)
        for step in range(begin, end):
            increment = _snr(step + 1, path_steps) - _snr(step, path_steps)
            total += math.sqrt(increment) * torch.randn(like.shape, generator=generator).to(like)
        longs.append(total / math.sqrt(_snr(end, path_steps) - _snr(begin, path_steps)))
    return longs


def _snr(step: int, steps: int) -> float:
    return (step / (steps - step)) ** 2
