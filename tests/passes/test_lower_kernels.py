"""lower_kernels: fused CPU kernels in the place of reference functions; the same results, and why what stays stays."""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import moeca_fx
from moeca_fx import MoECa, policies
from moeca_fx.graph.gated_form import ACTIVATIONS, GatedForm, gated_form
from moeca_fx.graph.storage import find_storage
from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.kernels.families import CPU, GPU
from moeca_fx.ops import dispatch, rows, storage
from moeca_fx.passes.kernels import attention
from moeca_fx.passes.kernels.edits import as_stored
from moeca_fx.passes.lower_inplace import lower_inplace
from moeca_fx.passes.lower_kernels import lower_kernels
from moeca_fx.passes.store_caches import store_caches
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.statistics import Statistics
from tests.helpers import zoo_models
from tests.helpers.compiled import vectorized
from tests.helpers.graphs import Compute, exported, stream
from tests.helpers.grids import slow, spread
from tests.helpers.passes import check_pass, count_ops
from tests.helpers.toys import WIDTH, Blend, Quarry, Toy, Wedge, toy, toy_inputs
from tests.helpers.transformed import zoo_pair

LOWER_KERNELS = import_module("moeca_fx.passes.lower_kernels")  # the package has a function of that name
pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
ops = torch.ops.moeca_cpu
aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOME = MoECa(tau0=0.6)


def test_a_vectorised_model() -> None:
    made = vectorized(toy(), toy_inputs())
    counts = {
        dispatch.ungroup_branches: (1, 0),
        dispatch.combine_branches: (1, 0),
        ops.mixture.default: (0, 1),
        aten.topk.default: (1, 0),
        ops.top_k.default: (0, 1),
    }
    with torch.no_grad():
        check_pass(made.module, lower_kernels, [toy_inputs(seed=1), toy_inputs(5, seed=2)], counts, tolerance=1e-5)


def _steps(fast: TransformedModel) -> list[Tensor]:
    with torch.no_grad():
        return [fast(*inputs)[0].clone() for inputs in zoo_models.trajectory(3, steps=6)]


def _compare(
    traced: TransformedModel, method: policies.Method, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Statistics, Statistics]:
    """Trajectories with and without kernels; their statistics."""
    fused = traced.with_policy(method)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "available", lambda: False)
        plain = traced.with_policy(method)
    for found, expected in zip(_steps(fused), _steps(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    one, other = fused.stats(), plain.stats()
    assert one.recomputed_branches == other.recomputed_branches
    return one, other


METHODS = (
    SOME,
    MoECa(tau0=0.6, attention="reuse", entropy_norm="minmax", score_weight="raw"),
    policies.build("branch_forecast", order=1, select="score"),
    policies.build("branch_forecast", margin=0.05, attention="full"),
    policies.build("toca", steps=6),
)


@pytest.mark.parametrize(
    ("method", "family"), spread(METHODS, ("dsmoe", "ditmoe")), ids=lambda value: getattr(value, "method", value)
)
def test_trajectories_with_and_without(
    method: policies.Method, family: zoo_models.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, traced = zoo_pair(family, None)
    fused, plain = _compare(traced, method, 1e-4, monkeypatch)
    assert fused.flops_executed <= plain.flops_executed  # the kernel for attention pads nothing


def test_a_cached_step_uses_them() -> None:
    _, fast = zoo_pair("dsmoe", SOME)
    graphs = fast._moeca.prepare(fast, zoo_models.inputs(), {}).graphs
    assert graphs is not None
    targets = {node.target for node in graphs.cached.graph.nodes}
    wanted = {kernels.recompute_branches, kernels.update_activation_, ops.decide.default, ops.threshold.default}
    assert wanted | {ops.attention_rows.default} <= targets
    assert dispatch.plan_recomputed not in targets


def test_refreshed_rows_are_routed_by_the_kernel_too() -> None:
    _, fast = zoo_pair("dsmoe", SOME)
    graphs = fast._moeca.prepare(fast, zoo_models.inputs(), {}).graphs
    assert graphs is not None
    programs = [child for child in graphs.cached.children() if isinstance(child, torch.fx.GraphModule)]
    targets = [node.target for program in programs for node in program.graph.nodes]
    assert ops.top_k.default in targets and aten.topk.default not in targets


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda value: value.method)
def test_trajectories_with_and_without_on_a_cache_in_bf16(
    method: policies.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = moeca_fx.transform(zoo_models.tiny_dsmoe(), zoo_models.inputs(), policy=None, cache_dtype="bf16")
    fused, _ = _compare(stored, method, 1e-2, monkeypatch)  # another sum may round to the next of its 8 bits
    assert fused.recomputed_branches > 0


def _cached_in_bf16() -> torch.fx.GraphModule:
    """A cached step whose vectors are stored in bf16, before `lower_kernels`."""
    traced = vectorized(zoo_models.tiny_dsmoe(depth=4), zoo_models.inputs())
    return store_caches(traced.graphs(SOME), find_storage("bf16")).cached


def test_which_kernels_read_a_cache_in_bf16() -> None:
    cached = _cached_in_bf16()
    result = lower_kernels(cached)
    assert result.count["recompute"] == 2
    assert count_ops(cached, dispatch.feature_norm) == 0
    calls = list(cached.graph.nodes)
    (one, two) = [node for node in calls if node.target is kernels.recompute_branches]
    assert all(node.args[0].op == "placeholder" for node in (one, two))
    attended = [node for node in calls if node.target is ops.attention_rows.default]
    assert attended and all(part.target is rows.write_rows for node in attended for part in node.args[1:3])
    normed = [node for node in calls if node.target is ops.gated_norm.default]
    assert sum(node.args[2].op == "placeholder" for node in normed) == 2  # the provisional routings'


def test_what_kernels_read_is_written_in_place() -> None:
    cached = _cached_in_bf16()
    lower_kernels(cached)
    lower_inplace(cached)
    narrow = [n for n in cached.graph.nodes if n.op == "call_function" and "narrow" in str(n.args[2:])]
    assert len(narrow) == 12 and {node.target for node in narrow} == {rows.write_rows_}


def test_a_triton_kernel_reads_values_in_one_dtype() -> None:
    cached = _cached_in_bf16()
    decoded = next(node for node in cached.graph.nodes if node.target is storage.decode_rows)
    assert as_stored(decoded, CPU) is decoded.args[0]
    assert as_stored(decoded, GPU) is decoded


def _attention(**options: Any) -> torch.fx.GraphModule:
    def compute(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1), **options)

    return exported(Compute(compute), stream())


@pytest.fixture
def faster_up_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set up to how many tokens the own attention is measured to be faster."""
    return lambda tokens: monkeypatch.setattr(attention, "own_attention_up_to", lambda: tokens)


@pytest.mark.parametrize("options", [{}, {"scale": 0.2}], ids=["default scale", "scale"])
def test_attention_of_all_tokens(options: dict[str, float], faster_up_to: Callable[[int], None]) -> None:
    faster_up_to(1024)
    counts = {SDPA: (1, 0), ops.attention.default: (0, 1)}
    check_pass(_attention(**options), lower_kernels, [(stream(seed=1),)], counts, tolerance=1e-5)


@pytest.mark.parametrize(
    ("up_to", "options", "reason"),
    [
        (0, {}, "attention: torch is as fast"),
        (2, {}, "attention: torch is as fast above 2 tokens"),
        (1024, {"is_causal": True}, "attention: it has a mask, dropout or a causal order"),
        (1024, {"attn_mask": torch.ones(5, 5).tril().bool()}, "attention: it has a mask, dropout or a causal order"),
    ],
)
def test_attention_that_stays(
    up_to: int, options: dict[str, Any], reason: str, faster_up_to: Callable[[int], None]
) -> None:
    faster_up_to(up_to)
    graph = _attention(**options)
    result = lower_kernels(graph)
    assert (result.count, list(result.left)) == ({}, [reason])
    assert graph.graph.find_nodes(op="call_function", target=SDPA)


def test_attention_in_bf16_stays(faster_up_to: Callable[[int], None]) -> None:
    faster_up_to(1024)

    def compute(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1))

    result = lower_kernels(exported(Compute(compute), stream().bfloat16()))
    assert (result.count, list(result.left)) == ({}, ["attention: it is not of fp32 heads [B, h, T, d]"])


# -- what stays, and why ------------------------------------------------------------------------------------------


def test_without_kernels_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = vectorized(toy(), toy_inputs())
    monkeypatch.setattr(kernels, "available", lambda: False)
    result = lower_kernels(made.module)
    assert (result.count, list(result.left)) == ({}, ["the CPU kernels are not built"])


def test_other_dtypes_keep_the_references_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    made = vectorized(toy().double(), tuple(part.double() for part in toy_inputs()))
    LOWER_KERNELS._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "moeca_fx.kernels"):
        results = [lower_kernels(made.module) for _ in range(2)]
    for result in results:
        assert (result.count, list(result.left)) == ({}, ["there is no CPU kernel for torch.float64"])
    (record,) = [record for record in caplog.records if record.name == "moeca_fx.kernels"]
    assert "there is no CPU kernel for torch.float64; slower reference operations run instead" in record.message


class _Averaged(Wedge):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * 0.5


class _Tanh(Wedge):
    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.c(functional.silu(self.a(z)) * self.b(z).tanh())
        return out


def _with(wedge: Callable[[], nn.Module]) -> Toy:
    return toy(layer=lambda: Blend(quarry=lambda: Quarry(wedge)))


@pytest.mark.parametrize(
    ("wedge", "reason"),
    [
        (_Averaged, "it does not end in a linear layer"),
        (_Tanh, "its product is not of an activated and a plain linear layer"),
    ],
)
def test_an_expert_of_another_form_keeps_its_program(wedge: Callable[[], nn.Module], reason: str) -> None:
    made = vectorized(_with(wedge), toy_inputs())
    expected = made.module(*toy_inputs(seed=1))
    result = lower_kernels(made.module)
    assert any(reason in left for left in result.left), result.left
    assert "branches" not in result.count and "grouped" not in result.count
    torch.testing.assert_close(made.module(*toy_inputs(seed=1)), expected)


class _Two(nn.Module):
    """No gate, with biases."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), act

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.b(self.act(self.a(z)))
        return out


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (functional.silu, "silu"),
        slow(functional.gelu, "gelu"),
        (lambda z: functional.gelu(z, approximate="tanh"), "gelu_tanh"),
        slow(functional.relu, "relu"),
    ],
)
def test_the_form_of_an_expert_without_a_gate(act: Callable[[Tensor], Tensor], name: str) -> None:
    made = vectorized(_with(lambda: _Two(act)), toy_inputs())
    program = next(child for path, child in made.module.named_children() if path.endswith("_experts"))
    form = gated_form(program)  # type: ignore[arg-type]  # expert programs are graph modules
    assert isinstance(form, GatedForm)
    assert form.gate is None and form.up_bias is not None and ACTIVATIONS[form.activation] == name
    with torch.no_grad():
        check_pass(made.module, lower_kernels, [toy_inputs(seed=3)], {ops.mixture.default: (0, 1)}, tolerance=1e-5)


def test_a_top_k_of_other_values_stays() -> None:
    graph = exported(Compute(lambda x: x.double().topk(2)[0].float()), stream())
    assert any("top_k: the values are not fp32" in left for left in lower_kernels(graph).left)
    graph = exported(Compute(lambda x: x.topk(2, dim=1)[0]), stream())
    assert any("the largest k along the last axis" in left for left in lower_kernels(graph).left)


def test_a_norm_with_weights_of_its_own_stays() -> None:
    graph = exported(Compute(lambda x: functional.layer_norm(x, x.shape[-1:], torch.ones(x.shape[-1]))), stream())
    assert any("the norm has weights of its own" in left for left in lower_kernels(graph).left)
