"""What must hold for every policy: fewer FLOPs, samples apart, known memory, one compiled graph a step, YAML."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import moeca_fx
from moeca_fx import policies
from moeca_fx.policies import Method
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.grids import slow
from tests.helpers.transformed import as_new
from tests.policies.every import BATCH_WISE, REQUIRED, STEPS, every_method, label

LEVELS = ("calibrated", "dbcache", "toca", "branch_forecast")


def _stands_for_its_level(method: Method) -> bool:
    name = method.method
    return name in LEVELS and method == policies.build(name, **REQUIRED.get(name, {}))


# Other settings of a method whose own run is fast; the parts are tested apart.
SLOW = (
    policies.build("branch_forecast", order=2, select="score"),
    policies.build("branch_forecast", select="score_budget", share=0.3),
    policies.build("forecast", order=2, basis="lagrange"),
    policies.build("dbcache", threshold=0.5, order=1),
)
METHODS = [(slow if method in SLOW else pytest.param)(method, id=label(method)) for method in every_method()]


def _model() -> torch.nn.Module:
    # As many output as input channels, and blocks enough for first, skipped and dense ones.
    return zoo_models.tiny_dsmoe(4, learn_sigma=False)


def _run(model: torch.nn.Module, keep: slice = slice(None), batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    y = torch.arange(batch)
    x, y = x[keep], y[keep]
    with torch.no_grad():
        for step in range(STEPS):
            x = x + model(x, torch.full((len(x),), step / STEPS), y)[0] / STEPS
    return x


@cache
def _plain() -> TransformedModel:
    return moeca_fx.transform(_model(), zoo_models.inputs(3), policy=None)


@cache
def _made(method: Method) -> TransformedModel:
    return _plain().with_policy(method)


def _transformed(method: Method) -> TransformedModel:
    """Transformed once for all tests, then used as new."""
    return as_new(_made(method))


@pytest.mark.parametrize("method", METHODS)
def test_saves_flops(method: Method) -> None:
    fast = _transformed(method)
    out = _run(fast)
    stats = fast.stats()
    assert torch.isfinite(out).all()
    assert stats.cached_steps >= 2 and stats.full_steps >= 2 and stats.cached_steps + stats.full_steps == STEPS
    assert stats.flops_speedup > 1.15


# One of each level: an estimate traces the model anew.
@pytest.mark.parametrize("method", [method for method in METHODS if _stands_for_its_level(method.values[0])])
def test_memory_is_known_before_a_run(method: Method) -> None:
    fast = _transformed(method)
    _run(fast)
    estimated = moeca_fx.estimate_memory(_model(), zoo_models.inputs(3), policy=method)
    assert dict(fast.memory().states) == dict(estimated.states)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method: Method) -> None:
    if method.method in BATCH_WISE:
        pytest.skip(f"{method.method} takes one decision a batch, as published")
    fast = _transformed(method)
    together = _run(fast)
    alone = _run(as_new(fast), slice(1, 2))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


# Dynamo takes seconds a graph.
FAST = ("calibrated", "branch_forecast")
COMPILED = [
    (pytest.param if method.method in FAST and _stands_for_its_level(method) else slow)(method, id=label(method))
    for method in every_method()
]


@pytest.mark.parametrize("method", COMPILED)
def test_every_step_compiles_to_one_graph(method: Method) -> None:
    fast = _transformed(method)
    graphs = fast._moeca.prepare(fast, zoo_models.inputs(3), {}).graphs
    assert graphs is not None
    for name, module in graphs.modules().items():
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
            compiled = torch.compile(module, fullgraph=True, backend=counter)
            compiled(*_example_arguments(fast, name))
        assert counter.frame_count == 1, f"{name}: {counter.frame_count} graphs"


def _example_arguments(fast: TransformedModel, name: str) -> list[torch.Tensor]:
    graphs = fast._moeca.prepare(fast, zoo_models.inputs(3), {}).graphs
    assert graphs is not None
    inputs = list(zoo_models.inputs(3))
    if name == "probe":
        assert graphs.probe is not None
        return [*inputs, torch.zeros(3, *graphs.probe.state.shape)]
    step = graphs.full_step if name == "full" else next(rule for rule in graphs.rules if rule.name == name)
    held = [torch.zeros(3, *state.shape, dtype=state.dtype) for state in step.reads]
    clock = [torch.ones(16)] if step.clock else []
    prefix = [torch.zeros(3, *graphs.probe.state.shape)] if step.prefix and graphs.probe is not None else []
    return [*inputs, *held, *clock, *prefix]


@pytest.mark.parametrize("method", every_method(), ids=label)
def test_yaml_and_back(method: Method, tmp_path: Path) -> None:
    policies.save(method, tmp_path / "policy.yaml", comment="made by a test")
    assert policies.load(tmp_path / "policy.yaml") == method


def test_the_interval_one_is_the_model_itself() -> None:
    model = _model()
    for name in ("moeca", "taylorseer", "branch_forecast"):
        fast = _plain().with_policy(policies.build(name, interval=1))
        torch.testing.assert_close(_run(fast), _run(model), rtol=1e-5, atol=1e-5)
        assert fast.stats().cached_steps == 0


def test_holding_the_output_is_fewer_euler_steps() -> None:
    model = _model()
    fast = _plain().with_policy(policies.build("forecast", interval=3, order=0, warmup=1))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    with torch.no_grad():
        for step in range(0, STEPS, 3):
            x = x + model(x, torch.full((3,), step / STEPS), torch.arange(3))[0] * 3 / STEPS
    torch.testing.assert_close(_run(fast), x, rtol=1e-5, atol=1e-5)
