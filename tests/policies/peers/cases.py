"""Tiny models in float64 and trajectories whose x and t change at every step."""

from collections.abc import Iterator

import torch

from moeca_fx.zoo import DiTMoE, DSMoE
from tests.helpers import zoo_models
from tests.helpers.zoo_models import Family, Inputs


def tiny_double(family: Family, depth: int = 4, seed: int = 0) -> DSMoE | DiTMoE:
    """A random float64 model of width 32 with 16 tokens on a 4 x 4 grid."""
    model: DSMoE | DiTMoE
    if family.startswith("dsmoe"):
        model = zoo_models.tiny_dsmoe(depth, groups=2 if family == "dsmoe-groups" else 1, seed=seed)
    else:
        model = zoo_models.tiny_ditmoe(packed=family == "ditmoe-packed", depth=depth, seed=seed)
    return model.double().requires_grad_(False)


def trajectory(batch: int = 2, steps: int = 12, drift: float = 0.2, seed: int = 0) -> Iterator[Inputs]:
    """Inputs of each step in float64: x drifts, every sample at a speed of its own, and t grows unevenly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 10, (batch,), generator=generator)
    speed = torch.linspace(0.5, 1.5, batch, dtype=torch.float64)[:, None, None, None]
    for j in range(steps):
        yield x, torch.full((batch,), 0.02 * j + 0.002 * j * j, dtype=torch.float64), y
        x = x + drift * speed * torch.randn(x.shape, generator=generator, dtype=torch.float64)
