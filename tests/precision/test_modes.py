"""The caller's modes and memory formats: inference mode, gradients, channels-last; casts, copies, pickles."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx.autocast import Autocast
from moeca_fx.errors import UnsupportedModelError
from moeca_fx.inputs import no_modes, ordinary, ordinary_mode
from moeca_fx.runtime.module import TransformedModel
from tests.precision.models import KINDS, Kind, inputs_of, model_of
from tests.precision.test_dtypes import EVERYTHING, difference
from tests.structures.model import build, call
from tests.structures.structure import Structure


def fast_of(model: torch.nn.Module, given: tuple[Tensor, ...]) -> TransformedModel:
    return moeca_fx.transform(model, given, policy=EVERYTHING, compile=False)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_around_everything(kind: Kind) -> None:
    model = model_of(kind)
    with torch.inference_mode():
        given = inputs_of()
        fast = fast_of(model, given)
        first, second, want = fast(*given), fast(given[0], given[1] + 0.1), model(*given)
    assert difference(first, want) <= 1e-5 and torch.isfinite(second).all()
    with torch.no_grad():  # caches that were written inside are read and written outside
        assert difference(fast(*inputs_of(clock=0.3)), model(*inputs_of(clock=0.3))) <= 1e-5
    assert len(fast._moeca.programs) == 1


def test_a_model_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        model = model_of("block")
    with pytest.raises(UnsupportedModelError, match=r"storeys\.0\.mixing\.ask.*inference_mode.*load the model outside"):
        fast_of(model, inputs_of())


def test_gradients_on() -> None:
    model = model_of("block").requires_grad_(True)
    grid, clock = inputs_of()
    fast = fast_of(model, (grid.requires_grad_(), clock))
    found = fast(grid, clock)
    assert not found.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert difference(found, model(grid, clock).detach()) <= 1e-5


@pytest.mark.parametrize(
    "structure",
    [
        Structure(),
        Structure(split="inline", gate="conv"),
        Structure(split="inline", container="stacked_in_out", dispatch="bmm"),
    ],
    ids=str,
)
def test_channels_last(structure: Structure) -> None:
    model, args, kwargs = build(structure)
    turned = (args[0].to(memory_format=torch.channels_last), *args[1:])
    want = call(model, (args, kwargs))
    fast = moeca_fx.transform(model, args, kwargs, policy=EVERYTHING, compile=False)
    for given in (args, turned, args, turned):
        assert difference(call(fast, (given, kwargs)), want) <= 1e-5
    assert len(fast._moeca.programs) == 1, "one program for every memory format"
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # weights too
    fast = moeca_fx.transform(model, turned, kwargs, policy=EVERYTHING, compile=False)
    for given in (args, turned):
        assert difference(call(fast, (given, kwargs)), want) <= 1e-5


@pytest.mark.parametrize("kind", ["method", "block"])
def test_inputs_that_are_not_contiguous(kind: Kind) -> None:
    model, (grid, clock) = model_of(kind), inputs_of()
    turned = grid.transpose(1, 2).contiguous().transpose(1, 2)
    fast = fast_of(model, (turned, clock[:1].expand(3)))
    for given in (grid, turned, grid[:1].expand(3, -1, -1), grid.repeat(2, 1, 1)[::2]):
        assert difference(fast(given, clock), model(given, clock)) <= 1e-5
    assert len(fast._moeca.programs) == 1


@pytest.mark.parametrize(
    "outside",
    [torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "grad", "inference", "autocast"],
)
def test_steps_run_without_the_modes_of_the_caller(outside: Callable[[], AbstractContextManager[Any]]) -> None:
    with outside():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        with no_modes(Autocast.now()):
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == before


def test_ordinary_inputs_are_not_copied() -> None:
    grid, clock = inputs_of()
    with torch.inference_mode():
        inside = torch.ones(2, 3)
    with ordinary_mode():
        made = ordinary(({"x": grid}, [clock, 2, None], inside, grid.transpose(0, 1)))
    assert made[0]["x"].data_ptr() == grid.data_ptr() and made[1][1:] == [2, None]
    assert not made[2].is_inference() and made[3].is_contiguous() and torch.equal(made[3], grid.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["method", "stacked"])
def test_casts_of_a_transformed_model(kind: Kind, dtype: torch.dtype) -> None:
    model, given = model_of(kind), inputs_of()
    fast = fast_of(model, given)
    fast(*given)
    cast = copy.deepcopy(fast).half() if dtype == torch.float16 else copy.deepcopy(fast).to(dtype)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
    with torch.no_grad():
        assert difference(cast(*inputs_of(dtype)), model_of(kind, dtype)(*inputs_of(dtype))) <= tolerance
        assert difference(fast(*given), model(*given)) <= 1e-5, "the copy was cast, not this one"


def test_a_copy_is_a_model_of_its_own() -> None:
    model, given = model_of("block"), inputs_of()
    fast = fast_of(model, given)
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        copied.storeys[0].mixing.back.weight.zero_()
    assert difference(fast(*given), model(*given)) <= 1e-5
    assert difference(copied(*given), model(*given)) > 1e-3
    assert isinstance(copied, type(model)) and copied._moeca is not fast._moeca


def test_pickling_is_refused_with_the_way_out() -> None:
    fast = fast_of(model_of("method"), inputs_of())
    for save in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(UnsupportedModelError, match=r"cannot be pickled.*state_dict"):
            save(fast)


def test_a_structure_in_bf16_inside_inference_mode() -> None:
    model, args, kwargs = build(replace(Structure(), split="inline", attention="qk_norm"))
    model = model.bfloat16()
    args = tuple(value.bfloat16() if value.is_floating_point() else value for value in args)
    with torch.inference_mode():
        fast = moeca_fx.transform(model, args, kwargs, policy=EVERYTHING, compile=False)
        assert difference(call(fast, (args, kwargs)), call(model, (args, kwargs))) <= 2e-2
