"""Models that take one sample alone, by their own code: proven where one batch size is enough, refused where not."""

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import UnprovenRegionError, UnsupportedModelError
from tests.helpers.toys import Toy, toy_inputs
from tests.precision.models import Kind, model_of


class _Alone(nn.Module):
    """A toy that refuses more than one sample."""

    def __init__(self, toy: Toy, noise: float = 0.0) -> None:
        super().__init__()
        self.toy, self.noise = toy, noise

    def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
        if grid.shape[0] != 1:
            raise ValueError("one at a time")
        out: Tensor = self.toy(grid, clock)
        return out + self.noise * torch.randn_like(out) if self.noise else out


def _alone(kind: Kind, noise: float = 0.0) -> _Alone:
    return _Alone(model_of(kind), noise).eval()


def test_a_method_is_proven_on_one_sample() -> None:
    model = _alone("method")
    fast = moeca_fx.transform(model, toy_inputs(1), policy=MoECa(interval=2), compile=False)
    for step in range(4):
        grid, _ = toy_inputs(1, seed=1)
        given = (grid + 1e-4 * step, torch.full((1,), 0.1 * step))
        found, wanted = fast(*given), model(*given)
        if step % 2 == 0:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert fast.stats().reuse_ratio > 0


@pytest.mark.parametrize("kind", ["block", "stacked"])
def test_a_block_needs_two_batch_sizes(kind: Kind) -> None:
    with pytest.raises(UnprovenRegionError, match=r"does not run on twice the samples.*one at a time"):
        moeca_fx.transform(_alone(kind), toy_inputs(1), compile=False)


def test_behaviour_is_looked_at_with_one_sample() -> None:
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        moeca_fx.transform(_alone("method", noise=0.1), toy_inputs(1), compile=False)
