"""Samplers and models whose trajectories can be worked out by hand."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moeca_fx.calibration import Model, Sampler


def euler(noise: Tensor, steps: int) -> Sampler:
    """``x + v / steps``; the model is called as ``model(x, t)`` with t a number."""

    def run(model: Model) -> Tensor:
        x = noise.clone()
        for step in range(steps):
            x = x + model(x, step / steps) / steps
        return x

    return run


def noisy(noise: Tensor, steps: int, seed: int) -> Sampler:
    """``(1 - 1/steps) x + 2 v / steps + 0.1 fresh noise``: affine and stochastic."""

    def run(model: Model) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = noise.clone()
        for step in range(steps):
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = (1 - 1 / steps) * x + 2 * model(x, step / steps) / steps + 0.1 * fresh
        return x

    return run


class Counting:
    """A model that counts its calls."""

    def __init__(self, model: Callable[[Tensor, float], Tensor]) -> None:
        self.model, self.calls = model, 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.calls += 1
        return self.model(x, t)


def polynomial(degree: int, batch: int, seed: int) -> Callable[[Tensor, float], Tensor]:
    """A velocity that is a polynomial of t with random tensor coefficients, whatever x."""
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(degree + 1, batch, 2, 3, 3, generator=generator, dtype=torch.float64)
    return lambda x, t: sum((c * t**i for i, c in enumerate(coefficients)), torch.zeros_like(x))


def bent(x: Tensor, t: float) -> Tensor:
    """A smooth nonlinear velocity that bends sharply near t = 0.7."""
    return torch.tanh(2 * x) * (1 + math.tanh(20 * (t - 0.7))) - x


def noise(batch: int, seed: int) -> Tensor:
    """[batch, 2, 3, 3], float64."""
    return torch.randn(batch, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
