"""lower_kernels with the kernels of a GPU, forced onto a CPU in Triton's interpreter: steps and caches as before."""

import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from moeca_fx import MoECa, policies
from moeca_fx.kernels import families
from moeca_fx.kernels.families import GPU
from moeca_fx.ops import dispatch
from moeca_fx.passes.cache.graphs import CachedGraphs, StepGraph
from moeca_fx.passes.kernels.experts import is_experts
from moeca_fx.passes.lower_inplace import lower_inplace
from moeca_fx.passes.lower_kernels import Lowered, lower_kernels
from moeca_fx.policies import Method
from moeca_fx.runtime.flops import measure_step_flops
from moeca_fx.zoo import DiTMoE, DiTMoEConfig, randomize_
from tests.helpers import zoo_models
from tests.helpers.compiled import Vectorized, vectorized
from tests.helpers.graphs import Compute, exported, stream
from tests.helpers.grids import slow
from tests.helpers.passes import check_pass
from tests.helpers.toys import toy, toy_inputs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="Triton's interpreter runs on a CPU; a GPU has no need to force"
    ),
]
SOME, ALL, UNMATCHED = MoECa(tau0=0.6), MoECa(tau0=0.0), MoECa(tau0=50.0)
Step = tuple[Tensor, ...]


def _dsmoe() -> nn.Module:
    """Experts of 9 inner values: no row of their weights is a multiple of 16 bytes."""
    return zoo_models.tiny_dsmoe(hidden_size=24, expert_width=9)


def _ditmoe() -> nn.Module:
    """Width 20, no multiple of 16 bytes in bf16; every block MoE."""
    sizes = {"input_size": 8, "hidden_size": 20, "depth": 2, "num_heads": 2, "mlp_ratio": 1}
    model = DiTMoE(DiTMoEConfig(**sizes, num_experts=5, num_classes=10))
    randomize_(model, 0)
    return model.eval()


@cache
def _made(make: Callable[[], nn.Module]) -> Vectorized:
    return vectorized(make(), zoo_models.inputs())


def _lowered(made: Vectorized, policy: Method) -> tuple[CachedGraphs, dict[str, Lowered]]:
    graphs = made.graphs(policy)
    results = {name: lower_kernels(module, GPU) for name, module in graphs.modules().items()}
    for rule in graphs.rules:
        lower_inplace(rule.module)
    return graphs, results


def _arguments(step: StepGraph, graphs: CachedGraphs, leaves: Step, states: Sequence[Tensor]) -> list[Tensor]:
    """Inputs, copies of the states that a step reads, and its clock."""
    held = {spec.name: state for spec, state in zip(graphs.states, states, strict=True)}
    clock = [torch.tensor([1.0, 0.0, 0.0])] if step.clock else []
    return [*leaves, *(held[spec.name].clone() for spec in step.reads), *clock]


def _empty(graphs: CachedGraphs, batch: int = 2) -> list[Tensor]:
    return [torch.full((batch, *spec.shape), spec.empty, dtype=spec.dtype) for spec in graphs.states]


def _run(step: StepGraph, graphs: CachedGraphs, leaves: Step, states: Sequence[Tensor]) -> list[Tensor]:
    """All results: the model's, the states, the counters."""
    with torch.no_grad():
        results = step.module(*_arguments(step, graphs, leaves, states))
    return [value.clone() for value in results if isinstance(value, Tensor)]


def _states(results: list[Tensor], step: StepGraph, graphs: CachedGraphs) -> list[Tensor]:
    end = len(results) - bool(step.counters)
    return results[end - len(graphs.states) : end]


def _close(found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Whole numbers are equal; others differ by a share of the largest."""
    for have, want in zip(found, expected, strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
        if want.is_floating_point():
            assert float((have - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))
        else:
            assert torch.equal(have, want)


def _trajectory(policy: Method, dtype: torch.dtype) -> tuple[list[Step], list[int]]:
    """Inputs, and the shares of branches that a step may recompute in them: (least, most) in percent."""
    still = policy is UNMATCHED
    steps = list(zoo_models.trajectory(2, steps=3, drift=0.0 if still else 0.2, tick=0.0 if still else 0.02))
    limits = {SOME: [1, 99], ALL: [100, 100], UNMATCHED: [0, 0]}[policy]
    return [(x.to(dtype), t.to(dtype), y) for x, t, y in steps], limits


def _recomputed(results: list[Tensor], step: StepGraph, graphs: CachedGraphs) -> float:
    """Share of the branches, in percent."""
    counts = [int(results[-1][i]) for i, c in enumerate(step.counters) if c.kind == "recomputed"]
    codes = [2 * torch.Size(spec.shape).numel() for spec in graphs.states if spec.kind == "expert"]
    return 100 * sum(counts) / sum(codes)


@pytest.mark.parametrize(
    ("make", "policy"),
    [
        pytest.param(_dsmoe, SOME, id="dsmoe-some"),
        pytest.param(_dsmoe, UNMATCHED, id="dsmoe-none"),
        slow(_dsmoe, ALL, id="dsmoe-all"),
        pytest.param(_ditmoe, ALL, id="ditmoe-all"),
        slow(_ditmoe, SOME, id="ditmoe-some"),
        slow(_ditmoe, UNMATCHED, id="ditmoe-none"),
    ],
)
def test_a_trajectory_in_fp32(make: Callable[[], nn.Module], policy: MoECa) -> None:
    model = _made(make)
    graphs, results = _lowered(model, policy)
    plain = model.graphs(policy)
    assert list(results["full"].count) == ["branches"]
    assert set(results["cached"].count) == {"recompute", "decide", "attention_rows"}
    steps, (least, most) = _trajectory(policy, torch.float32)
    kept = other = _empty(graphs)
    for index, leaves in enumerate(steps):
        one, two = (g.full_step if index == 0 else g.rules[0] for g in (graphs, plain))
        found, expected = _run(one, graphs, leaves, kept), _run(two, plain, leaves, other)
        _close(found, expected, 1e-5)
        kept, other = _states(found, one, graphs), _states(expected, two, plain)
        if index:
            assert least <= _recomputed(found, one, graphs) <= most


@pytest.mark.parametrize(
    ("make", "dtype"), [(_dsmoe, torch.bfloat16), slow(_ditmoe, torch.bfloat16), (_ditmoe, torch.float16)]
)
def test_steps_in_lower_precision(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Every step from the reference's caches: a rounding error that chooses another expert must not spread."""
    steps, _ = _trajectory(SOME, dtype)
    made = vectorized(make().to(dtype), steps[0])
    graphs, _ = _lowered(made, SOME)
    plain = made.graphs(SOME)
    states, tolerance = _empty(graphs), 3e-2 if dtype == torch.bfloat16 else 4e-3
    for index, leaves in enumerate(steps):
        one, two = (g.full_step if index == 0 else g.rules[0] for g in (graphs, plain))
        found, expected = _run(one, graphs, leaves, states), _run(two, plain, leaves, states)
        for have, want in zip(found[: 1 + len(states)], expected, strict=False):
            assert (have.shape, have.dtype) == (want.shape, want.dtype)
            near = (have - want).abs() <= tolerance * max(1.0, float(want.abs().max()))
            assert float(near.float().mean()) > 0.9
        states = _states(expected, two, plain)


@pytest.mark.parametrize(
    "policy",
    [
        MoECa(tau0=0.6, attention="reuse", entropy_norm="minmax", score_weight="raw"),
        policies.build("branch_forecast", order=1, select="score"),
        policies.build("branch_forecast", margin=0.05, attention="full"),
        policies.build("toca", steps=6),
    ],
    ids=["moeca", "forecast", "sticky", "toca"],
)
def test_other_policies(policy: Method) -> None:
    graphs, _ = _lowered(_made(_dsmoe), policy)
    plain = _made(_dsmoe).graphs(policy)
    assert not any(is_experts(node) for module in graphs.modules().values() for node in module.graph.nodes)
    kept = other = _empty(graphs)
    for index, leaves in enumerate(_trajectory(SOME, torch.float32)[0]):
        for one, two in zip(graphs.rules, plain.rules, strict=True) if index else [(graphs.full_step, plain.full_step)]:
            found, expected = _run(one, graphs, leaves, kept), _run(two, plain, leaves, other)
            _close(found, expected, 1e-5)
        kept, other = _states(found, one, graphs), _states(expected, two, plain)


def test_a_model_without_a_policy() -> None:
    """Its weighted sum is left to what follows."""
    made = vectorized(toy(), toy_inputs())
    counts = {
        dispatch.ungroup_branches: (1, 0),
        dispatch.combine_branches: (1, 1),
        torch.ops.aten.topk.default: (1, 1),
        GPU.op("branches"): (0, 1),
    }
    examples = [toy_inputs(seed=1), toy_inputs(5, seed=2)]
    with torch.no_grad():
        check_pass(made.module, lambda module: lower_kernels(module, GPU), examples, counts, tolerance=1e-5)


def test_flops_are_those_of_the_reference_without_padding() -> None:
    made, leaves = _made(_dsmoe), zoo_models.inputs()
    lowered, plain = (
        measure_step_flops(made.module, graphs, leaves, 2, {})
        for graphs in (_lowered(made, SOME)[0], made.graphs(SOME))
    )
    assert (lowered.uncached, lowered.full) == (plain.uncached, plain.full)
    (one,), (other,) = lowered.rules, plain.rules
    assert one.fixed == other.fixed
    recomputed = {counter: cost for counter, cost in other.each.items() if counter.kind == "recomputed"}
    assert recomputed.items() <= one.each.items()
    assert not any(counter.kind == "attention_padded" for counter in one.each)


def test_the_compiler_takes_both_steps_whole() -> None:
    """One graph each, without a break at an operation, whatever the number of recomputed branches."""
    graphs, results = _lowered(vectorized(toy(), toy_inputs()), UNMATCHED)
    assert set(results["cached"].count) == {"recompute", "decide", "attention_rows"}
    first, later = toy_inputs(2, seed=1), toy_inputs(2, seed=2)
    states = _empty(graphs)
    torch._dynamo.reset()
    for step, inputs in ((graphs.full_step, [first, later]), (graphs.rules[0], [first, later])):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step.module, fullgraph=True, backend=counter)
        for leaves in inputs:
            expected = _run(step, graphs, leaves, states)
            with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
                found = [part.clone() for part in compiled(*_arguments(step, graphs, leaves, states))]
            _close(found, expected, 1e-5)
        assert counter.frame_count == 1
        states = _states(_run(step, graphs, first, states), step, graphs)


# -- what stays, and why ------------------------------------------------------------------------------------------


def test_what_stays_says_what_serves_instead() -> None:
    _, results = _lowered(_made(_dsmoe), SOME)
    assert set(results["cached"].left) == {
        f"{name}: {GPU.missing[name]}" for name in ("threshold", "update_activation", "top_k", "norm")
    }
    _, results = _lowered(_made(_dsmoe), policies.build("branch_forecast", margin=0.05))
    assert f"decide_picked: {GPU.missing['decide_picked']}" in results["cached"].left


def test_experts_in_slices_are_lowered() -> None:
    made = vectorized(zoo_models.tiny_ditmoe(depth=1), zoo_models.inputs())
    assert lower_kernels(made.module, GPU).count == {"branches": 1}


def test_without_triton_nothing_changes() -> None:
    made = vectorized(toy(), toy_inputs())
    before = made.module.code
    result = lower_kernels(made.module, replace(GPU, available=lambda: False))
    assert (result.count, list(result.left)) == ({}, ["there are no Triton kernels"])
    assert made.module.code == before


@pytest.mark.parametrize(
    ("name", "said"), [("no triton", "Triton is not installed"), ("switched off", "switched off by")]
)
def test_why_there_are_no_kernels_is_said_once(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "no triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setenv(families.GPU_OFF, "0")
    families.triton_is_there.cache_clear()
    with caplog.at_level(logging.INFO, "moeca_fx.kernels"):
        assert not GPU.available() and not GPU.available()
    families.triton_is_there.cache_clear()
    (record,) = [record for record in caplog.records if record.name == "moeca_fx.kernels"]
    assert said in record.message


def test_dtypes_without_a_kernel() -> None:
    made = vectorized(toy().double(), tuple(part.double() for part in toy_inputs()))
    assert list(lower_kernels(made.module, GPU).left) == ["there is no Triton kernel for torch.float64"]


def test_weights_on_another_device_choose_no_kernels() -> None:
    module = exported(Compute(lambda x, w: x * w, w=torch.ones(8)), stream()).to("meta")
    (reason,) = lower_kernels(module).left
    assert reason == "the weights are on meta; kernels take one of a CPU and a CUDA GPU"
