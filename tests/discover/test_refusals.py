"""What is not proven is refused, with the reason; `transform` then changes nothing and says so."""

from collections.abc import Callable
from functools import partial

import pytest
from torch import nn

import moeca_fx
from moeca_fx.discover import discover
from moeca_fx.errors import NoMoEFoundError, UnprovenRegionError
from tests.discover import layers
from tests.helpers.toys import Blend, toy, toy_inputs

LIST = "storeys.0.layer.quarry.stones"
CASES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "hidden bias": (partial(Blend, quarry=layers.HiddenBias), LIST, "differs from its output by"),
    "region called twice": (layers.CalledTwice, LIST, "storeys.0.layer.forward"),
    "one expert ran": (layers.OneFavourite, LIST, "only 1 of 4 experts ran"),
}


@pytest.mark.parametrize(("layer", "path", "reason"), CASES.values(), ids=CASES.keys())
def test_unproven_layers(layer: Callable[[], nn.Module], path: str, reason: str) -> None:
    model = toy(layer)
    found = discover(model, toy_inputs(), {})
    assert found.regions == ()
    (refusal,) = [refusal for refusal in found.refused if refusal.is_moe]
    assert refusal.path == path and reason in refusal.reason
    with pytest.raises(UnprovenRegionError) as caught:
        moeca_fx.transform(model, toy_inputs())
    message = str(caught.value)
    assert path in message and reason in message and "nothing was changed" in message


def test_one_unproven_layer_refuses_the_model() -> None:
    kinds = iter([Blend, partial(Blend, quarry=layers.HiddenBias)])
    model = toy(lambda: next(kinds)(), height=2)
    found = discover(model, toy_inputs(), {})
    assert [region.path for region in found.regions] == ["storeys.0.layer.quarry"]
    with pytest.raises(UnprovenRegionError, match=r"storeys\.1\.layer\.quarry"):
        moeca_fx.transform(model, toy_inputs())


def test_parallel_networks_without_router_are_no_experts() -> None:
    model = toy(layers.EveryExpert)
    found = discover(model, toy_inputs(), {})
    assert found.regions == ()
    (refusal,) = found.refused
    assert (refusal.path, refusal.is_moe) == ("storeys.0.layer.stones", False)
    assert "no router" in refusal.reason
    with pytest.raises(NoMoEFoundError, match=r"storeys\.0\.layer\.stones: no router"):
        moeca_fx.transform(model, toy_inputs())
