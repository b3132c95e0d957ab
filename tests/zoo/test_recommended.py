"""The policy files that ship beside the digits model do what their names say, on latents and classes never tuned on."""

from pathlib import Path

import pytest
import torch

import moeca_fx
from moeca_fx.evaluate import psnr
from moeca_fx.zoo.digits.config import WEIGHTS
from moeca_fx.zoo.sampling import sample

FOLDER = Path(WEIGHTS).parent
STEPS = 50


@pytest.mark.parametrize(("name", "least"), [("best-4x", 46.0), ("branch-4x", 42.0)])
def test_quality_and_speed(name: str, least: float) -> None:
    model = moeca_fx.zoo.build("digits")
    noise = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(77))
    labels = torch.tensor([1, 3, 5, 7, 9, 1, 3, 5])
    example = (noise, torch.zeros(8), labels)
    fast = moeca_fx.transform(model, example, policy=FOLDER / f"{name}.yaml")
    plain = moeca_fx.transform(model, example, policy=None)
    reference = sample(plain, noise, labels, STEPS)
    found = sample(fast, noise, labels, STEPS)
    assert fast.stats().flops_speedup > 3.9
    median = sorted(psnr(a[None], b[None]) for a, b in zip(found, reference, strict=True))[4]
    assert median > least
