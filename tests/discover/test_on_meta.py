"""Discovery on the meta device finds what discovery on data finds, from one copy a structure."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import moeca_fx
from moeca_fx.discover import Discovery, MoERegion, discover, on_meta
from moeca_fx.errors import InputError, NoMoEFoundError
from tests.helpers import zoo_models
from tests.helpers.toys import Blend, Toy, toy, toy_inputs
from tests.runtime.test_bad_input import Dense

Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


def _to_meta(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to("meta"), value)


def _without_error(regions: tuple[MoERegion, ...]) -> list[MoERegion]:
    return [replace(region, error=0.0) for region in regions]


def _found_on_meta(model: nn.Module, inputs: tuple[Tensor, ...]) -> Discovery:
    return discover(model.to("meta"), _to_meta(inputs), {})


MODELS: dict[str, Make] = {
    "toy": lambda: (toy(), toy_inputs()),
    "dit_moe": lambda: (zoo_models.tiny_ditmoe(), zoo_models.inputs()),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_regions(name: str) -> None:
    wanted = discover(*MODELS[name](), {})
    found = _found_on_meta(*MODELS[name]())
    assert _without_error(found.regions) == _without_error(wanted.regions) and found.regions
    assert all(region.error < 1e-5 for region in found.regions)


def test_each_structure_is_studied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    studied = []
    study = on_meta._study

    def counted(module: nn.Module, *rest: Any) -> Any:
        studied.append(module)
        return study(module, *rest)

    monkeypatch.setattr(on_meta, "_study", counted)
    model = toy(height=3)
    assert len(_found_on_meta(model, toy_inputs()).regions) == 3
    assert [type(module).__name__ for module in studied] == ["Quarry", "Blend"]  # no router in the first


class PicksPerStorey(Toy):
    """Layers of equal shapes that route to different numbers of experts."""

    def __init__(self) -> None:
        super().__init__(Blend, height=2)
        layers = [module for module in self.modules() if isinstance(module, Blend)]
        layers[1].picks = 3


def test_attributes_belong_to_the_structure() -> None:
    found = _found_on_meta(PicksPerStorey().eval(), toy_inputs())
    assert [region.top_k for region in found.regions] == [2, 3]


def test_the_model_is_left_as_it_was() -> None:
    model = toy().to("meta")
    before = {path: sorted(vars(module)) for path, module in model.named_modules()}
    _found_on_meta(model, toy_inputs())
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == before
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_dense_model_has_none() -> None:
    with pytest.raises(NoMoEFoundError):
        moeca_fx.estimate_memory(Dense().eval().to("meta"), _to_meta(toy_inputs()))


def test_a_model_that_cannot_run_on_meta() -> None:
    """DSMoE's router asks for the autocast state of its device, which meta has none of."""
    with pytest.raises(InputError, match=r"DSMoE cannot run on the example inputs: .*autocast"):
        _found_on_meta(zoo_models.tiny_dsmoe(), zoo_models.inputs())


def test_real_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="a model on the meta device takes inputs on it"):
        moeca_fx.estimate_memory(toy().to("meta"), toy_inputs())
    with pytest.raises(InputError, match="expected a tensor where the model's weights are"):
        moeca_fx.inspect(toy(), _to_meta(toy_inputs()))


def test_a_report_without_weights() -> None:
    wanted = moeca_fx.inspect(toy(), toy_inputs())
    found = moeca_fx.inspect(toy().to("meta"), _to_meta(toy_inputs()))
    assert found.sites == wanted.sites and found.flops == wanted.flops
    assert any("nothing was proven on data" in warning for warning in found.warnings)
    assert moeca_fx.estimate_memory(toy().to("meta"), _to_meta(toy_inputs()), batch=5).batch == 5
    assert torch.get_default_device().type == "cpu"
