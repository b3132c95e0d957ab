"""LoRA through peft and diffusers' loader: fused, beside the weights, on some experts alone, and switched meanwhile."""

from typing import Any

import pytest
import torch
from torch import nn

import moeca_fx
from moeca_fx.errors import NoMoEFoundError, UnprovenRegionError
from moeca_fx.pipelines.denoiser import _Parts
from tests.helpers.toys import Blend, Quarry, toy, toy_inputs
from tests.precision.models import inputs_of, model_of
from tests.precision.test_dtypes import EVERYTHING, difference

peft = pytest.importorskip("peft", reason="its layers are imitated in test_wrapped_models.py")


def adapted(model: nn.Module, pattern: str) -> nn.Module:
    torch.manual_seed(3)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=pattern, init_lora_weights=False), model)
    return model.eval()


def test_adapters_in_some_experts_are_named_with_the_way_out() -> None:
    model = adapted(model_of("block"), r"storeys\.0\.layer\.quarry\.stones\.1\.(a|b|c)")
    found = r"storeys\.0\.layer\.quarry\.stones: peft adapters are in 1 of its 4 modules \(1\); merge .*fuse_lora"
    with pytest.raises(NoMoEFoundError, match=found):
        moeca_fx.transform(model, inputs_of(), policy=None, compile=False)


def test_a_layer_of_many_whose_experts_are_adapted_in_part_refuses_the_model() -> None:
    model = adapted(toy(lambda: Blend(Quarry), height=2), r"storeys\.1\.layer\.quarry\.stones\.[02]\.a")
    with pytest.raises(UnprovenRegionError, match=r"storeys\.1\.layer\.quarry\.stones: peft .* 2 of its 4") as error:
        moeca_fx.transform(model, toy_inputs(), policy=None, compile=False)
    assert error.value.code == "adapters"


def _tiny() -> Any:
    """A diffusers transformer with its loader of adapters."""
    from diffusers.loaders import PeftAdapterMixin

    from tests.helpers.pipelines import TinyMoE

    class Adaptable(TinyMoE, PeftAdapterMixin):
        """TinyMoE is what diffusers' classes are, but for this mixin."""

    torch.manual_seed(0)
    return Adaptable().eval().requires_grad_(False)


def _calls(seed: int = 1) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([5.0, 5.0]), torch.tensor([1, 2])), {
        "return_dict": False
    }


def test_diffusers_loads_fuses_and_unfuses() -> None:
    model, (args, kwargs) = _tiny(), _calls()
    plain = model(*args, **kwargs)[0]
    names = ["ask", "keep", "back", "a", "b", "c"]
    source = _tiny()
    source.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    state = peft.get_peft_model_state_dict(source)
    model.load_lora_adapter({f"transformer.{key}": value for key, value in state.items()}, network_alphas=None)
    model.eval().requires_grad_(False)  # the loader leaves new layers in training mode
    beside = model(*args, **kwargs)[0]
    assert difference(beside, plain) > 1e-2
    fast = moeca_fx.transform(model, args, kwargs, policy=EVERYTHING, compile=False, timestep="timestep")
    assert difference(fast(*args, **kwargs)[0], beside) <= 1e-5, "beside the weights"
    parts = _Parts(model).names
    model.fuse_lora()
    assert difference(fast(*args, **kwargs)[0], beside) > 1e-3, "its graphs add the adapter to weights that hold it"
    assert difference(model(*args, **kwargs)[0], beside) <= 1e-5
    assert _Parts(model).names != parts, "a pipeline sees that the layers compute something else, and transforms again"
    fused = moeca_fx.transform(model, args, kwargs, policy=EVERYTHING, compile=False, timestep="timestep")
    assert difference(fused(*args, **kwargs)[0], beside) <= 1e-5, "fused"
    model.unfuse_lora()
    unfused = moeca_fx.transform(model, args, kwargs, policy=None, compile=False)
    assert difference(unfused(*args, **kwargs)[0], beside) <= 1e-5


def test_weights_that_are_changed_in_place_are_seen_whatever_changed_them() -> None:
    """As `fuse_lora` followed by taking the adapter's layers off."""
    model = model_of("method")
    fast = moeca_fx.transform(model, inputs_of(), policy=None, compile=False)
    before = model(*inputs_of()).detach()
    with torch.no_grad():
        for stone in model.storeys[0].layer.quarry.stones:
            stone.a.weight.mul_(1.5)
        assert difference(fast(*inputs_of()), model(*inputs_of())) <= 1e-5 < difference(fast(*inputs_of()), before)
