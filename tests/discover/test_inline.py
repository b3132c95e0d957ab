"""Blocks with their router, dispatch and experts in one method: found, proven, replayed for other batches and data."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx.batch import doubled
from moeca_fx.discover import MoERegion, discover
from tests.discover import layers
from tests.helpers.toys import PICKS, POOL, TOKENS, WIDTH, Blend, Wedge, toy, toy_inputs

LAYER = "storeys.0.layer"


class Doubled(layers.InlineRouting):
    """Half of its own input back, and a loss beside the result, inside of the layer."""

    def forward(self, z: Tensor) -> Tensor:
        mixed = super().forward(z)
        return 0.5 * z + mixed * 1.5


class Threshold(layers.InlineRouting):
    """Every expert above a threshold, however many."""

    def forward(self, z: Tensor) -> Tensor:
        share = self.compass(z).sigmoid()
        share = torch.where(share > 0.5, share, 0.0)
        parts = torch.stack([stone(z) for stone in self.stones], -2)
        mixed: Tensor = (parts * share[..., None]).sum(-2)
        return mixed


class SeldomAsked(layers.InlineRouting):
    """Adds one expert after the other; no token of the examples asks for the last, so its partial sums look whole."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.compass.bias[-1] = -1.2

    def forward(self, z: Tensor) -> Tensor:
        share = self.compass(z).sigmoid()
        share = share * (share > 0.5)
        total = torch.zeros_like(z)
        for number, stone in enumerate(self.stones):
            total = total + share[..., number, None] * stone(z)
        return total


class WithIdle(layers.InlineRouting):
    """Two of the experts have no parameters: one passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.compass = nn.Linear(WIDTH, POOL + 1)
        self.stones = nn.ModuleList([Wedge(), nn.Identity(), *(Wedge() for _ in range(POOL - 1))])


class Limited(layers.InlineRouting):
    """No expert takes more than two tokens of a sample; what comes later is dropped."""

    limit = 2

    def forward(self, z: Tensor) -> Tensor:
        share, which = self.compass(z).softmax(-1).topk(PICKS, dim=-1)  # [B, T, k]
        queue = which.flatten(1)
        before = nn.functional.one_hot(queue, POOL).cumsum(1).gather(2, queue.unsqueeze(-1)).view_as(which) - 1
        total = torch.zeros_like(z)
        for number, stone in enumerate(self.stones):
            sample, token, place = torch.where((which == number) & (before < self.limit))
            part = stone(z[sample, token]) * share[sample, token, place, None]
            total.index_put_((sample, token), part, accumulate=True)
        return total


class SeldomLimited(Limited):
    """The limit is so high that the example inputs never reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = TOKENS - 1
        with torch.no_grad():
            self.compass.weight.mul_(4)


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "inline routing": (layers.InlineRouting, {"path": LAYER, "top_k": PICKS, "form": None, "empty_slots": False}),
    "stacked": (layers.StackedExperts, {"path": LAYER, "top_k": PICKS, "keyword": None}),
    "returns a pair": (partial(Blend, quarry=layers.ReturnsPair), {"path": f"{LAYER}.quarry", "top_k": PICKS}),
    "dense weights": (partial(Blend, quarry=layers.OneHotMask), {"path": f"{LAYER}.quarry", "empty_slots": False}),
    "weights squared": (partial(Blend, quarry=layers.WeightedTwice), {"top_k": PICKS}),
    "part of its input back": (Doubled, {"path": LAYER}),
    "threshold": (Threshold, {"top_k": POOL, "empty_slots": True}),
    "seldom asked": (SeldomAsked, {"top_k": POOL, "empty_slots": True}),
    "without parameters": (WithIdle, {"free": ((1, f"{LAYER}.stones.1"),), "empty_slots": True}),
    "dropped": (Limited, {"empty_slots": True, "top_k": PICKS}),
    "dropped, but not of the examples": (SeldomLimited, {"empty_slots": True}),
}


def _region(layer: Callable[[], nn.Module]) -> tuple[nn.Module, MoERegion]:
    model = toy(layer)
    found = discover(model, toy_inputs(), {})
    assert [refusal for refusal in found.refused if refusal.is_moe] == []
    (region,) = found.regions
    return model, region


@pytest.mark.parametrize(("layer", "fields"), KINDS.values(), ids=KINDS.keys())
def test_what_is_found(layer: Callable[[], nn.Module], fields: dict[str, object]) -> None:
    _, region = _region(layer)
    assert region.inline and region.error < 1e-6 and region.num_experts == POOL
    assert {name: getattr(region, name) for name in fields} == fields


@pytest.mark.parametrize("layer", [layer for layer, _ in KINDS.values()], ids=KINDS.keys())
def test_the_transformed_model_is_equal_for_other_batches_and_data(layer: Callable[[], nn.Module]) -> None:
    model = toy(layer)
    fast = moeca_fx.transform(model, toy_inputs(), policy=None)
    generator = torch.Generator().manual_seed(5)
    for batch in (1, 3, 4):
        inputs = (torch.randn(batch, TOKENS, WIDTH, generator=generator), torch.rand(batch, generator=generator))
        with torch.no_grad():
            expected, found = model(*inputs), fast(*inputs)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_an_expert_that_no_example_asks_for_counts_once_elsewhere() -> None:
    model, asked = toy(SeldomAsked), []
    fast = moeca_fx.transform(model, toy_inputs(), policy=None)
    generator = torch.Generator().manual_seed(5)
    elsewhere = (torch.randn(32, TOKENS, WIDTH, generator=generator), torch.rand(32, generator=generator))
    layer = model.get_submodule(LAYER)
    hook = layer.compass.register_forward_hook(lambda _module, _args, out: asked.append(int((out[..., -1] > 0).sum())))
    model(*toy_inputs()), model(*doubled(toy_inputs(), {})[0])
    expected = model(*elsewhere)
    hook.remove()
    assert asked[:2] == [0, 0] and asked[2] > 0
    torch.testing.assert_close(fast(*elsewhere), expected, rtol=1e-5, atol=1e-5)


class OffByOnePercent(layers.InlineRouting):
    """One expert enters with 1.01 times its weight."""

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, WIDTH)
        share, which = self.compass(rows).softmax(-1).topk(PICKS, dim=-1)
        total = torch.zeros_like(rows)
        for number, stone in enumerate(self.stones):
            row, place = torch.where(which == number)
            factor = 1.01 if number == 2 else 1.0
            total.index_add_(0, row, factor * stone(rows[row]) * share[row, place, None])
        return total.view(z.shape)


class DataDependent(layers.InlineRouting):
    """What is added beside the experts depends on a number that Python read from the data."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + float(z.abs().max()) * z


REFUSED = {
    "an expert off by one percent": (OffByOnePercent, "no values of its run are token rows"),
    "a number read from the data": (DataDependent, "its replay differs"),
}


@pytest.mark.parametrize(("layer", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(layer: Callable[[], nn.Module], reason: str) -> None:
    found = discover(toy(layer), toy_inputs(), {})
    assert found.regions == ()
    (refusal,) = [refusal for refusal in found.refused if refusal.is_moe]
    assert reason in refusal.reason
    with pytest.raises(moeca_fx.errors.UnprovenRegionError, match="nothing was changed"):
        moeca_fx.transform(toy(layer), toy_inputs())
