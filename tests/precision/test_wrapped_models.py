"""Offloading, hooks and adapters: models that are not only what their classes say."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import UnsupportedModelError
from tests.helpers.grids import slow, spread
from tests.helpers.toys import Toy
from tests.precision.models import KINDS, Kind, inputs_of, model_of
from tests.precision.test_dtypes import EVERYTHING, difference


def _of(package: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as if a module of that package had defined it."""
    made = FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    made.__module__ = f"{package}.hooks"
    return made


def _hooked(module: nn.Module) -> None:
    """As offloading tools do: the original kept, forward replaced on the instance by a partial."""
    original = module.forward

    def new_forward(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    module.forward = functools.partial(_of("accelerate", new_forward), module)  # type: ignore[method-assign]


def test_an_offloading_hook_is_refused_with_the_way_out() -> None:
    model = model_of("block")
    _hooked(model.storeys[0].layer)
    with pytest.raises(UnsupportedModelError, match=r"storeys\.0\.layer: .* by accelerate.*remove_hook_from_module"):
        moeca_fx.transform(model, inputs_of(), policy=None, compile=False)


def test_an_offloaded_model_says_so_though_its_weights_are_elsewhere() -> None:
    model = model_of("block").to("meta")
    _hooked(model)
    with pytest.raises(UnsupportedModelError, match="remove_hook_from_module"):
        moeca_fx.transform(model, inputs_of(), policy=None, compile=False)


@pytest.mark.parametrize(
    ("package", "found"), [("diffusers", "by diffusers.*group offloading"), ("elsewhere", "by elsewhere.*remove them")]
)
def test_hooks_name_their_package(package: str, found: str) -> None:
    model = model_of("block")
    model.storeys[0].register_forward_pre_hook(_of(package, lambda _module, _args: None))
    with pytest.raises(UnsupportedModelError, match=rf"storeys\.0: has forward or backward hooks {found}"):
        moeca_fx.transform(model, inputs_of(), policy=None, compile=False)


def test_after_a_hook_was_taken_off_the_model_transforms() -> None:
    """The original forward is put back on the instance, where it must not hide the transformed one."""
    model = model_of("block")
    for module in model.modules():
        module.forward = module.forward  # type: ignore[method-assign]
    _equal_and_reusing(model)


@pytest.mark.parametrize("kind", [KINDS[0], *map(slow, KINDS[1:])])
def test_with_accelerate(kind: Kind) -> None:
    accelerate = pytest.importorskip("accelerate", reason="optional: its offloading is imitated above")
    model = model_of(kind)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"by accelerate.*remove_hook_from_module"):
        moeca_fx.transform(model, inputs_of(), policy=None, compile=False)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    _equal_and_reusing(model)


class LowRank(nn.Module):
    """A linear layer with an adapter beside it: ``W x + scaling * B(A(x))``."""

    def __init__(self, base: nn.Linear, rank: int = 2, scaling: float = 0.5) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, scaling
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        for name in self.lora_A:
            update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
            result = result + update * self.scaling
        return result

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base_layer.weight += self.scaling * self.lora_B["default"].weight @ self.lora_A["default"].weight
        return self.base_layer


ATTENTION, EXPERTS, ROUTER = ("ask", "keep", "back"), ("a", "b", "c"), ("compass",)


def _adapted(model: Toy, names: tuple[str, ...]) -> Toy:
    torch.manual_seed(9)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child).requires_grad_(False))
    return model.eval()


def _merged(model: Toy) -> Toy:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LowRank):
                setattr(module, name, child.merged())
    return model


def _equal_and_reusing(model: nn.Module) -> None:
    fast = moeca_fx.transform(model, inputs_of(), policy=EVERYTHING, compile=False)
    given = inputs_of(seed=4, clock=0.3)
    with torch.no_grad():
        assert difference(fast(*given), model(*given)) <= 1e-5
        reusing = fast.with_policy(MoECa(interval=4, tau0=3.0))
        for step in range(3):
            reusing(given[0] * (1 + 0.01 * step), given[1] + 0.02 * step)
    statistics = reusing.stats()
    assert statistics.cached_steps == 2
    assert any(site.recomputed < site.branches for site in statistics.sites)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("method", EXPERTS), ("block", ROUTER), ("stacked", ATTENTION), slow("method", ATTENTION), slow("block", EXPERTS)],
)
def test_adapters_beside_the_weights(kind: Kind, names: tuple[str, ...]) -> None:
    given = inputs_of()
    with torch.no_grad():
        assert difference(_adapted(model_of(kind), names)(*given), model_of(kind)(*given)) > 1e-3, (
            "it changes something"
        )
    _equal_and_reusing(_adapted(model_of(kind), names))


@pytest.mark.parametrize("kind", ["block", slow("method")])
def test_merged_adapters(kind: Kind) -> None:
    given = inputs_of()
    model = _merged(_adapted(model_of(kind), EXPERTS))
    with torch.no_grad():
        assert difference(_adapted(model_of(kind), EXPERTS)(*given), model(*given)) <= 1e-5
    _equal_and_reusing(model)


def test_an_adapter_on_some_experts_alone_is_no_list_of_equal_experts() -> None:
    model = model_of("block")
    _adapted(model.storeys[0].layer.quarry.stones[1], EXPERTS)  # type: ignore[arg-type]
    with pytest.raises(moeca_fx.errors.MoecaError, match="found no mixture-of-experts layer"):
        moeca_fx.transform(model, inputs_of(), policy=None, compile=False)


@pytest.mark.parametrize(("kind", "names"), spread(["method", "block"], [ATTENTION, EXPERTS]))
def test_with_peft(kind: Kind, names: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft", reason="optional: its layers are imitated above")
    config = peft.LoraConfig(r=2, target_modules=list(names), init_lora_weights=False)
    model = model_of(kind)
    peft.inject_adapter_in_model(config, model)
    _equal_and_reusing(model.eval())
    merged = peft.get_peft_model(model_of(kind), config).merge_and_unload()
    _equal_and_reusing(merged.eval().requires_grad_(False))
