"""Run a reference and the product side by side over a trajectory and compare them after every step."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from moeca_fx.zoo import DiTMoE, DSMoE
from tests.helpers import zoo_models
from tests.helpers.zoo_models import Family, Inputs, prediction
from tests.reference.peers import Reference

TOLERANCE = 1e-5  # of the largest expected value: scores and routers are fp32 in the product, the rest is fp64 here
MARGIN = 1e-5  # decisions nearer to a tie may fall otherwise in fp32


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


def compare(
    reference: Reference,
    transformed: Any,
    steps: Iterable[Inputs],
    kinds: Callable[[Any], list[str]] | None = None,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Assert equal predictions at every step, and equal step kinds.

    Args:
        reference: not called yet.
        transformed: what `moeca_fx.transform` made of the same model, at the start of a trajectory.
        steps: (x, t, y) of every step.
        kinds: reads the kinds of the steps so far from the product, one name a step, "full" or anything else for a
            step that is not; None to compare predictions only.
        tolerance: largest difference allowed, of the largest expected value.

    Returns:
        The reference's kinds.
    """
    for j, inputs in enumerate(steps):
        with torch.no_grad():
            found = prediction(transformed(*inputs))
        expected = reference(*inputs)
        where = f"step {j} ({reference.kinds[-1]})"
        if kinds is not None:
            made = kinds(transformed)[j]
            assert (made == "full") == (reference.kinds[-1] == "full"), f"{where}: the product calls it {made!r}"
        _assert_close(found, expected, tolerance, where)
    assert reference.margin > MARGIN, f"a decision is {reference.margin:.1e} from a tie: use another seed"
    return reference.kinds


def _assert_close(found: Tensor, expected: Tensor, tolerance: float, where: str) -> None:
    assert found.shape == expected.shape, where
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{where}: relative difference {error:.2e}, allowed {tolerance:.0e}"
