"""Regions whose experts choose their tokens are proven by value, and refused when the value differs."""

from functools import partial

import pytest
import torch
from torch import Tensor

from moeca_fx.discover import MoERegion, discover
from tests.helpers.expert_choice_toys import LOTS, Auction, Market, market_toy
from tests.helpers.toys import POOL, Toy, toy_inputs

PLACE = "storeys.0.layer.auction"


@pytest.mark.parametrize("flat", [False, True])
def test_every_field_of_a_region(flat: bool) -> None:
    found = discover(market_toy(partial(Market, flat=flat)), toy_inputs(), {})
    (region,) = found.regions
    assert region.error < 1e-6
    assert region == MoERegion(
        path=PLACE,
        method="settle",
        block="storeys.0.layer",
        experts=tuple(f"{PLACE}.bidders.{i}" for i in range(POOL)),
        top_k=LOTS,
        x="grains",
        expert="spot",
        weight="price",
        error=region.error,
        container=f"{PLACE}.bidders",
        layout="expert",
    )


class _Crooked(Auction):
    """Off by one percent of one expert, or by a token each."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def settle(self, grains: Tensor, spot: Tensor, price: Tensor) -> Tensor:
        total = super().settle(grains, spot, price)
        if self.how == "price":
            only = torch.zeros_like(price)
            only[:, 1] = 0.01 * price[:, 1]
            total = total + super().settle(grains, spot, only)
        if self.how == "spot":  # what an expert makes of one token goes to another
            rows, back = torch.zeros_like(grains), spot.flip(-1)[..., None].expand(-1, -1, -1, grains.shape[-1])
            for number, bidder in enumerate(self.bidders):
                taken = grains.gather(1, spot[:, number, :, None].expand(-1, -1, grains.shape[-1]))
                rows = rows.scatter_add(1, back[:, number], bidder(taken) * price[:, number, :, None])
            return rows
        return total


class _Twice(Market):
    """The last token of every expert is its first once more."""

    def choose(self, z: Tensor) -> tuple[Tensor, Tensor]:
        spot, price = super().choose(z)
        return torch.cat([spot[..., :-1], spot[..., :1]], -1), price


def _crooked(how: str) -> Toy:
    model = market_toy()
    layer = model.storeys[0].get_submodule("layer")
    other = _Crooked(how)
    other.bidders = layer.get_submodule("auction").get_submodule("bidders")
    layer.auction = other
    return model


@pytest.mark.parametrize("how", ["price", "spot"])
def test_what_differs_is_refused(how: str) -> None:
    found = discover(_crooked(how), toy_inputs(), {})
    assert found.regions == ()
    (refusal,) = [refusal for refusal in found.refused if refusal.is_moe]
    assert PLACE in refusal.reason
    assert discover(_crooked("not"), toy_inputs(), {}).regions[0].layout == "expert"


def test_a_token_twice_in_a_row_is_refused() -> None:
    found = discover(market_toy(_Twice), toy_inputs(), {})
    assert found.regions == () and any(refusal.is_moe for refusal in found.refused)
