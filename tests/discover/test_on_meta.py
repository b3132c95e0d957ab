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
from moeca_fx.discover.random_weights import with_random_weights
from moeca_fx.discover.reference import TOLERANCE
from moeca_fx.errors import InputError, NoMoEFoundError
from tests.discover import layers
from tests.helpers import zoo_models
from tests.helpers.toys import Blend, Toy, toy, toy_inputs
from tests.precision.models import KINDS, Kind, inputs_of, model_of
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
    "router inside": lambda: (toy(layers.InlineRouting, height=2), toy_inputs()),
    "stacked": lambda: (toy(layers.StackedExperts, height=2), toy_inputs()),
    "stacked, one sample": lambda: (toy(layers.StackedExperts, height=2), toy_inputs(1)),
    "router around a list": lambda: (model_of("block", height=2), inputs_of()),
    "stacked, gated": lambda: (model_of("stacked", height=2), inputs_of()),
    "stacked, bf16": lambda: (model_of("stacked", torch.bfloat16), inputs_of(torch.bfloat16, tokens=64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_regions(name: str) -> None:
    wanted = discover(*MODELS[name](), {})
    found = _found_on_meta(*MODELS[name]())
    assert _without_error(found.regions) == _without_error(wanted.regions) and found.regions
    assert all(region.error <= TOLERANCE[next(MODELS[name]()[0].parameters()).dtype] for region in found.regions)
    assert {region.proven_on for region in found.regions} == {found.regions[0].block}
    assert not any(region.proven_on for region in wanted.regions)


@pytest.mark.parametrize("name", [name for name in MODELS if "bf16" not in name])
def test_reports_agree(name: str) -> None:
    """Graphs, FLOPs and caches follow from the replay of one layer."""
    wanted = moeca_fx.inspect(*MODELS[name]())
    model, inputs = MODELS[name]()
    found = moeca_fx.inspect(model.to("meta"), _to_meta(inputs))
    assert found.sites == wanted.sites and found.flops == wanted.flops and found.cache_bytes > 0


def test_the_report_names_what_was_proven() -> None:
    model = toy(layers.StackedExperts, height=3).to("meta")
    said = "\n".join(moeca_fx.inspect(model, _to_meta(toy_inputs())).warnings)
    proven = "with random numbers for weights: storeys.0.layer, for 3 layers of its structure and shapes"
    assert "nothing was proven on data" in said and proven in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boost", [0.99, 1.01])
def test_code_that_is_one_percent_off_is_refused(kind: Kind, boost: float) -> None:
    found = _found_on_meta(model_of(kind, boost=boost, height=2), inputs_of(tokens=64))
    assert not found.regions and any(refusal.is_moe for refusal in found.refused)


def test_stacked_experts_share_memory_and_differ() -> None:
    with torch.device("meta"):
        layer = layers.StackedExperts()
        layer.first, layer.second = nn.Parameter(torch.empty(32, 64, 96)), nn.Parameter(torch.empty(32, 96, 64))
    filled = with_random_weights(layer)
    first = filled.get_parameter("first")
    assert first.shape == (32, 64, 96) and first.untyped_storage().nbytes() < first.numel()  # four bytes a number
    results = torch.randn(64) @ first
    assert float(torch.corrcoef(results).fill_diagonal_(0).abs().max()) < 0.7
    assert list(dict(filled.named_parameters())) == list(dict(layer.named_parameters()))
    assert all(parameter.is_meta for parameter in layer.parameters())


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
