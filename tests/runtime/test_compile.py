"""torch.compile takes both step graphs whole: one graph each, no recompilation while the miss rate varies."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.testing import CompileCounterWithBackend

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.passes.insert_cache import CachedGraphs
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.expert_choice_toys import LOTS, market_toy
from tests.helpers.toys import POOL, toy_inputs
from tests.helpers.transformed import toy_pair, zoo_pair

REUSE_MATCHED = MoECa(tau0=50.0)  # what is recomputed is what has no match: set by the cached expert ids
MISS_RATES = (0.0, 0.1, 0.5, 1.0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def _graphs(fast: TransformedModel, inputs: tuple[Tensor, ...]) -> CachedGraphs:
    graphs = fast._moeca.prepare(fast, inputs, {}).graphs
    assert graphs is not None
    return graphs


def _run_compiled(
    module: fx.GraphModule, calls: Sequence[Sequence[Tensor]], backend: str
) -> list[list[tuple[Tensor, Tensor]]]:
    """(compiled, eager) of every tensor result of every call; asserts that one graph served all calls."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    pairs = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        for call in calls:
            # Cached steps write into their caches: each run gets its own.
            found, expected = compiled(*_copies(call)), module(*_copies(call))
            tensors = [(f, e) for f, e in zip(found, expected, strict=True) if isinstance(e, Tensor)]
            pairs.append(tensors)
    assert counter.frame_count == 1, f"{counter.frame_count} graphs"
    return pairs


def _copies(call: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in call]


def _assert_close(pairs: list[list[tuple[Tensor, Tensor]]]) -> None:
    for call in pairs:
        assert call
        for found, expected in call:
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _full_calls(graphs: CachedGraphs, steps: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    batch = steps[0][0].shape[0]
    carried = [torch.zeros(batch, *s.shape, dtype=s.dtype) for s in graphs.states if s.carried]
    return [[*inputs, *carried] for inputs in steps]


def _cached_calls(graphs: CachedGraphs, inputs: tuple[Tensor, ...], outputs: int) -> list[list[Tensor]]:
    """Calls on the caches of a full step, in which a share of the rows of slots has lost what they hold."""
    with torch.no_grad():
        states = graphs.full(*_full_calls(graphs, [inputs])[0])[outputs:]
    calls = []
    for rate in MISS_RATES:
        held = [state.clone() for state in states]
        for spec, state in zip(graphs.states, held, strict=True):
            if spec.kind in ("expert", "token"):
                state.flatten(0, 1)[: round(rate * state.shape[0] * state.shape[1])] = spec.empty
        calls.append([*inputs, *held])
    return calls


def _recomputed(graphs: CachedGraphs, pairs: list[list[tuple[Tensor, Tensor]]]) -> list[int]:
    """Branches recomputed at the first MoE site, in each call: the last result holds the counters."""
    index = next(i for i, counter in enumerate(graphs.counters) if counter.kind == "recomputed")
    return [int(call[-1][0][index]) for call in pairs]


@pytest.mark.parametrize("family", ["dsmoe", pytest.param("ditmoe-packed", marks=pytest.mark.slow)])
def test_one_graph_each_whatever_the_miss_rate(family: zoo_models.Family) -> None:
    _, fast = zoo_pair(family, REUSE_MATCHED)
    inputs = zoo_models.inputs(3, seed=1, t=0.3)
    graphs = _graphs(fast, inputs)
    outputs = 6 if family == "dsmoe" else 1
    steps = [zoo_models.inputs(3, seed=seed, t=0.1 * seed) for seed in range(3)]
    _assert_close(_run_compiled(graphs.full, _full_calls(graphs, steps), "aot_eager"))
    pairs = _run_compiled(graphs.cached, _cached_calls(graphs, inputs, outputs), "aot_eager")
    _assert_close(pairs)
    branches = 3 * zoo_models.TOKENS * (3 if family == "dsmoe" else 2)
    recomputed = _recomputed(graphs, pairs)
    assert recomputed[0] == 0 and recomputed[-1] == branches
    assert recomputed == sorted(recomputed) and len(set(recomputed)) == len(MISS_RATES)


def test_one_graph_each_where_experts_choose_their_tokens() -> None:
    fast = moeca_fx.transform(market_toy(), toy_inputs(), policy=REUSE_MATCHED)
    inputs = toy_inputs(2, seed=1)
    graphs = _graphs(fast, inputs)
    steps = [inputs, toy_inputs(2, seed=2), toy_inputs(2, seed=3)]
    _assert_close(_run_compiled(graphs.full, _full_calls(graphs, steps), "aot_eager"))
    pairs = _run_compiled(graphs.cached, _cached_calls(graphs, inputs, 1), "aot_eager")
    _assert_close(pairs)
    recomputed = _recomputed(graphs, pairs)
    assert recomputed[0] == 0 and recomputed[-1] == 2 * POOL * LOTS
    assert recomputed == sorted(recomputed) and len(set(recomputed)) == len(MISS_RATES)


def _through_inductor(name: str, choosing: bool = False) -> None:
    fast = toy_pair(REUSE_MATCHED)[1]
    if choosing:
        fast = moeca_fx.transform(market_toy(), toy_inputs(), policy=REUSE_MATCHED)
    inputs = toy_inputs(2, seed=1)
    graphs = _graphs(fast, inputs)
    if name == "full":
        calls = _full_calls(graphs, [inputs, toy_inputs(2, seed=2)])
        _assert_close(_run_compiled(graphs.full, calls, "inductor"))
    else:
        pairs = _run_compiled(graphs.cached, _cached_calls(graphs, inputs, 1), "inductor")
        _assert_close(pairs)
        assert _recomputed(graphs, pairs)[0] == 0


def test_inductor_compiles_the_cached_step() -> None:
    _through_inductor("cached")


@pytest.mark.slow
def test_inductor_compiles_the_full_step() -> None:
    _through_inductor("full")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "cached"])
def test_inductor_compiles_both_steps_where_experts_choose(name: str) -> None:
    _through_inductor(name, choosing=True)
