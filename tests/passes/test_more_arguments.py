"""A dispatching method that takes more than rows, ids and weights. The marker has no more: experts run one by one."""

from functools import partial

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa
from tests.helpers.toys import PICKS, POOL, WIDTH, Blend, Quarry, Toy, toy, toy_inputs


class _Places(Quarry):
    """Puts every row in a buffer of its expert, at a place that its caller computed; no buffer overflows."""

    def forward(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        place = (torch.nn.functional.one_hot(which.flatten(), POOL).cumsum(0) - 1).gather(1, which.reshape(-1, 1))
        return self.carve(grains, which, share, place.view_as(which), len(grains))

    def carve(self, grains: Tensor, which: Tensor, share: Tensor, place: Tensor, room: int) -> Tensor:
        buffers = grains.new_zeros(POOL, room, WIDTH)
        buffers[which, place] = grains.unsqueeze(1).expand(-1, PICKS, -1)
        made = torch.stack([stone(part) for stone, part in zip(self.stones, buffers, strict=True)])
        total: Tensor = (made[which, place] * share.unsqueeze(-1)).sum(1)
        return total


@pytest.fixture
def model() -> Toy:
    return toy(partial(Blend, quarry=_Places))


def test_it_is_proven_traced_and_reused(model: Toy) -> None:
    fast = moeca_fx.transform(model, toy_inputs(), policy=MoECa(interval=4, tau0=3.0))
    (region,) = fast._moeca.regions
    assert (region.method, region.inline) == ("carve", False)
    for step in range(4):
        grid, clock = toy_inputs(2, seed=1, clock=0.1 * step)
        found = fast(grid + 1e-3 * step, clock)
        if step == 0:
            torch.testing.assert_close(found, model(grid, clock), rtol=1e-5, atol=1e-5)
    assert fast.stats().reuse_ratio > 0


def test_in_bf16(model: Toy) -> None:
    given = tuple(value.bfloat16() for value in toy_inputs())
    model = model.bfloat16()
    fast = moeca_fx.transform(model, given, policy=None)
    torch.testing.assert_close(fast(*given), model(*given), rtol=2e-2, atol=2e-2)
