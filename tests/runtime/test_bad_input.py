"""Every bad input of the Python API: the right exception, saying what is wrong, where, and what to do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import ConfigError, InputError, MoecaError, NoMoEFoundError, UnsupportedModelError
from tests.helpers import zoo_models
from tests.helpers.toys import WIDTH, toy, toy_inputs
from tests.helpers.transformed import toy_pair


class Dense(nn.Module):
    """No experts anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
        out: Tensor = grid + self.two(self.one(grid).relu()) * clock.sin()[:, None, None]
        return out


def test_a_model_without_experts() -> None:
    with pytest.raises(NoMoEFoundError, match=r"Dense: found no mixture-of-experts layer \(expected .*no candidates"):
        moeca_fx.transform(Dense().eval(), toy_inputs())


def test_what_is_no_module() -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module, found str"):
        moeca_fx.transform("model", toy_inputs())  # type: ignore[arg-type]


def test_training_mode_of_the_model_and_of_a_part() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Toy, .* in training mode.*call model\.eval\(\) first"):
        moeca_fx.transform(toy().train(), toy_inputs())
    model = toy()
    model.storeys[0].layer.train()
    with pytest.raises(UnsupportedModelError, match=r"storeys\.0\.layer, .*more modules: in training mode"):
        moeca_fx.transform(model, toy_inputs())


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks(kind: str) -> None:
    model = toy()
    layer = model.storeys[0].mixing
    handle = getattr(layer, f"register_{kind}_hook")(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match=r"storeys\.0\.mixing: has forward or backward hooks.*remove them"):
        moeca_fx.transform(model, toy_inputs())
    handle.remove()
    assert moeca_fx.inspect(model, toy_inputs()).sites


def test_integer_experts() -> None:
    model = toy()
    linear = model.storeys[0].layer.quarry.stones[1].a
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        UnsupportedModelError, match=r"stones\.1\.a: quantised weights.*transform the unquantised model"
    ):
        moeca_fx.transform(model, toy_inputs())


def test_quantised_modules() -> None:
    class Quantised(nn.Linear):
        """Stands for a module of torch.ao.nn.quantized, which not every build can make."""

    Quantised.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"
    model = toy()
    model.storeys[0].layer.quarry.stones[2].b = Quantised(WIDTH, 8, bias=False).eval()
    with pytest.raises(UnsupportedModelError, match=r"stones\.2\.b: quantised weights"):
        moeca_fx.transform(model, toy_inputs())


def test_weights_in_int8_buffers() -> None:
    """Weight-only quantisation keeps its integers in buffers."""

    class Int8Linear(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.register_buffer("scale", weight.abs().amax() / 127)
            self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)

    model = toy()
    for stone in model.storeys[0].layer.quarry.stones:
        for name in ("a", "b", "c"):
            setattr(stone, name, Int8Linear(getattr(stone, name).weight).eval())
    with pytest.raises(UnsupportedModelError, match=r"stones\.0\.a, .*: quantised weights"):
        moeca_fx.transform(model, toy_inputs())


GRID, CLOCK = toy_inputs()
WRONG_INPUTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no inputs": ((), {}, r"do not fit Toy\.forward.*missing a required argument: 'grid'"),
    "one missing": ((GRID,), {}, "missing a required argument: 'clock'"),
    "one too many": ((GRID, CLOCK, CLOCK), {}, "too many positional arguments"),
    "unknown keyword": ((GRID, CLOCK), {"speed": 1}, "unexpected keyword argument 'speed'"),
    "a list": ([GRID, CLOCK], {}, "example_inputs: expected a tuple, found list"),
    "a tensor": (GRID, {}, "example_inputs: expected a tuple, found Tensor"),
    "wrong shape": ((GRID[..., :5], CLOCK), {}, "Toy cannot run on the example inputs: RuntimeError"),
    "wrong dtype": ((GRID.double(), CLOCK), {}, "Toy cannot run on the example inputs: RuntimeError"),
    "wrong type": ((GRID, "noon"), {}, "Toy cannot run on the example inputs: TypeError"),
    "NaN": ((GRID, CLOCK * float("nan")), {}, "example input 1: expected finite values, found NaN"),
    "infinity": ((GRID / 0.0, CLOCK), {}, "example input 0: expected finite values"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
@pytest.mark.parametrize("function", ["transform", "inspect", "estimate_memory"])
def test_wrong_example_inputs(function: str, case: str) -> None:
    args, kwargs, message = WRONG_INPUTS[case]
    with pytest.raises(InputError, match=message):
        getattr(moeca_fx, function)(toy(), args, kwargs)


def test_wrong_inputs_at_run_time() -> None:
    _, fast = toy_pair()
    with torch.no_grad():
        fast(GRID, CLOCK)
        for inputs in ((GRID[..., :5], CLOCK), (GRID.double(), CLOCK)):
            with pytest.raises(InputError, match="Toy cannot run on"):
                fast(*inputs)
        with pytest.raises((InputError, TypeError), match="clock"):
            fast(GRID)


INFINITY, NAN = float("inf"), float("nan")
OUT_OF_RANGE: list[tuple[str, Any]] = [
    *[("interval", value) for value in (0, -1, 1.5, "4", True, None)],
    *[
        (name, value)
        for name in ("tau0", "lambda1", "lambda2")
        for value in (-0.1, float("inf"), float("nan"), "1", None)
    ],
    *[(name, value) for name in ("alpha", "beta") for value in (-0.1, 1.0, 1, NAN, True, "0.5")],
    *[(name, value) for name in ("score_weight", "entropy_norm") for value in ("", "SHARE", None, 1)],
    *[(name, value) for name in ("attention", "dense_ffn", "shared_expert") for value in ("none", None, True)],
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=lambda v: repr(v))
def test_config_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        MoECa(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"MoECa.{name}: expected ") and f"found {value!r}; pass a value" in message


def test_every_config_field_is_covered_and_its_edges_are_allowed() -> None:
    assert {name for name, _ in OUT_OF_RANGE} == set(MoECa().as_dict())
    MoECa(interval=1, tau0=0, alpha=0, beta=0, lambda1=0, lambda2=0)
    MoECa(tau0=1e9, alpha=0.999, beta=0.999)


@pytest.mark.parametrize("policy", [MoECa, 4, {"interval": 4}])
def test_policies_of_another_type(policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy: expected moeca_fx\.MoECa\(\.\.\.\) or another method, .* found "):
        moeca_fx.transform(toy(), toy_inputs(), policy=policy)


def test_refusals_change_nothing() -> None:
    model = zoo_models.tiny_dsmoe()
    before = [(name, p.data_ptr()) for name, p in model.named_parameters()]
    with pytest.raises(InputError):
        moeca_fx.transform(model, zoo_models.inputs()[:2])
    with pytest.raises(InputError):
        moeca_fx.transform(model, zoo_models.inputs(), timestep="y_embedder")
    after = [(name, p.data_ptr()) for name, p in model.named_parameters()]
    assert [name for name, _ in after] == [name for name, _ in before]
    with torch.no_grad():
        assert torch.isfinite(model(*zoo_models.inputs())[0]).all()


def test_every_error_of_the_package_is_a_moeca_error() -> None:
    kinds = [kind for kind in vars(moeca_fx.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5 and all(issubclass(kind, MoecaError) for kind in kinds)
