"""Compilation of a program's graphs: what is compiled when, what falls back, and that it computes the same."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.exc import InductorError

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.runtime import compiler
from moeca_fx.runtime.compiler import CompiledStep, why_not_compiled
from tests.helpers import zoo_models
from tests.helpers.toys import toy, toy_inputs

CPU = torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`torch.compile` replaced by a recorder that runs eagerly."""
    calls: list[dict[str, Any]] = []

    def record(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        calls.append(options)
        return function

    monkeypatch.setattr(torch, "compile", record)
    monkeypatch.setenv(compiler.OFF, "1")
    return calls


def _double() -> fx.GraphModule:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    return fx.symbolic_trace(Double())


def test_the_first_batch_size_is_fixed_and_the_second_opens_it(compiled: list[dict[str, Any]]) -> None:
    step = CompiledStep(_double(), "double step", torch.device("cpu"))
    for batch in (2, 2, 3, 5, 2):
        assert torch.equal(step(batch, torch.ones(batch)), torch.full((batch,), 2.0))
    assert [call["dynamic"] for call in compiled] == [False, True]
    assert all(call["fullgraph"] for call in compiled)
    assert "guard_filter_fn" in compiled[0]["options"] and "guard_filter_fn" not in compiled[1]["options"]


def test_another_number_of_threads_gets_code_of_its_own(compiled: list[dict[str, Any]]) -> None:
    step = CompiledStep(_double(), "double step", torch.device("cpu"))
    step(2, torch.ones(2))
    torch.set_num_threads(2)
    step(2, torch.ones(2))
    assert [call["dynamic"] for call in compiled] == [False, False]


def test_what_cannot_be_compiled_runs_eagerly_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Callable[..., Any]:
        def run(*_: Any) -> Any:
            raise InductorError(RuntimeError("no such instruction"), None)  # type: ignore[no-untyped-call, arg-type]

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setenv(compiler.OFF, "1")
    compiler.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "moeca_fx.compile"):
        for _ in range(2):
            assert torch.equal(
                CompiledStep(_double(), "odd step", torch.device("cpu"))(2, torch.ones(2)), torch.full((2,), 2.0)
            )
    (record,) = caplog.records
    assert "the odd step could not be compiled and runs eagerly" in record.message and "no such instr" in record.message


def test_an_error_of_the_model_is_no_error_of_the_compiler(compiled: list[dict[str, Any]]) -> None:
    with pytest.raises(TypeError):
        CompiledStep(_double(), "double step", torch.device("cpu"))(2, torch.ones(2), torch.ones(2))


def test_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_compiled(CPU) == "MOECA_FX_COMPILE=0 is set"  # as in every test
    monkeypatch.delenv(compiler.OFF)
    assert "not for mps" in str(why_not_compiled(torch.device("mps")))
    monkeypatch.setattr(compiler.shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in str(why_not_compiled(CPU))
    monkeypatch.setenv("CXX", "c++")
    assert why_not_compiled(CPU) is None


def test_transform_compiles_every_graph_by_default(compiled: list[dict[str, Any]]) -> None:
    fast = moeca_fx.transform(toy(), toy_inputs(2), policy=MoECa(interval=2))
    with torch.no_grad():
        for step in range(4):
            fast(*_at(step))
    assert len(compiled) == 2  # a full step and a cached one
    compiled.clear()
    fast.with_policy(None)(*_at(0))
    assert len(compiled) == 1
    compiled.clear()
    fast.with_policy(None, compile=False)(*_at(0))
    moeca_fx.transform(toy(), toy_inputs(2), policy=None, compile=False)(*_at(0))
    assert not compiled


def _at(step: int) -> tuple[Tensor, Tensor]:
    grid, clock = toy_inputs(2, seed=1)
    return grid, torch.full_like(clock, 0.1 * step)


@pytest.mark.slow
def test_compiled_trajectories_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.OFF, "1")
    torch._dynamo.reset()
    model = zoo_models.tiny("dsmoe")
    fast = moeca_fx.transform(model, zoo_models.inputs(), policy=MoECa(tau0=0.6))
    eager = fast.with_policy(MoECa(tau0=0.6), compile=False)
    for batch, threads in ((2, 1), (3, 1), (3, 2)):  # fixed, then open, then fixed for other threads
        torch.set_num_threads(threads)
        for x, t, y in zoo_models.trajectory(batch, steps=6):
            odd = x.transpose(2, 3).contiguous().transpose(2, 3)  # other strides, same values
            with torch.no_grad():
                found, expected = fast(odd, t[:1].expand(batch), y)[0], eager(x, t, y)[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert fast.stats().recomputed_branches == eager.stats().recomputed_branches
    assert 0 < fast.stats().recomputed_branches < fast.stats().branches
