"""sibling_linears: layers of the same samples in one call, results unchanged; tokens and strangers stay apart."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from moeca_fx import MoECa
from moeca_fx.graph.rewrite import example_value
from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops.cpu_gemm import Fastest
from moeca_fx.passes.lower_linear import lower_linear
from moeca_fx.passes.sibling_linears import sibling_linears
from tests.helpers.graphs import WIDTH, Compute, exported, stream
from tests.helpers.passes import check_pass, count_ops
from tests.helpers.transformed import zoo_pair

pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
single = torch.ops.moeca_cpu.chosen_linear.default if kernels.available() else None
widened = torch.ops.moeca_cpu.linear.default if kernels.available() else None
joined = torch.ops.moeca_cpu.sibling_linears.default if kernels.available() else None
LOWER_LINEAR = import_module("moeca_fx.passes.lower_linear")  # the package has a function of that name
OUTPUTS = 6
Layer = tuple[Tensor, Tensor | None]
Compute_ = Callable[..., Tensor | tuple[Tensor, ...]]


def _lowered(
    monkeypatch: pytest.MonkeyPatch,
    compute: Compute_,
    count: int,
    fastest: Fastest = Fastest(3),  # noqa: B008  # frozen
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> fx.GraphModule:
    """The graph of `compute(x, *layers)` after `lower_linear`."""
    monkeypatch.setattr(LOWER_LINEAR, "fastest_linear", lambda *_, **__: fastest)
    monkeypatch.setattr(LOWER_LINEAR, "widening_is_faster", lambda: True)
    weights = {f"w{i}": torch.randn(OUTPUTS, WIDTH, dtype=dtype) for i in range(count)}
    biases = {f"b{i}": torch.randn(OUTPUTS, dtype=dtype) for i in range(count)} if bias else {}

    def run(x: Tensor, **given: Tensor) -> Tensor | tuple[Tensor, ...]:
        return compute(x, *((given[f"w{i}"], given.get(f"b{i}")) for i in range(count)))

    graph = exported(Compute(run, **weights, **biases), stream().to(dtype))
    lower_linear(graph)
    return graph


def _check(graph: fx.GraphModule, left: int, calls: int, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Run the pass within the own kernel's rows and beyond them."""
    examples = [(stream(2, seed=1).to(dtype),), (stream(5, seed=2).to(dtype),)]
    target = single if dtype is torch.float32 else widened
    with torch.no_grad():
        ops = {target: (count_ops(graph, target), left), joined: (0, calls)}
        return check_pass(graph, sibling_linears, examples, ops, 1e-5 if dtype is torch.float32 else 2e-2)


def _of_activations(x: Tensor, *layers: Layer) -> Tensor:
    condition = x[:, 0]  # [B, H]
    return torch.cat([functional.linear(functional.silu(condition), *layer) for layer in layers], -1)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_condition(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    after = _check(_lowered(monkeypatch, _of_activations, 3, bias=bias), 0, 1)
    assert count_ops(after, torch.ops.aten.silu.default) == 1, "the activation is computed once"


def test_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    _check(_lowered(monkeypatch, _of_activations, 3, dtype=torch.bfloat16), 0, 1, torch.bfloat16)


def test_an_activation_that_something_else_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(x: Tensor, one: Layer, other: Layer) -> Tensor:
        first, second = functional.silu(x[:, 0]), functional.silu(x[:, 0])
        return functional.linear(first, *one).sum(-1) + functional.linear(first, *other).sum(-1) + second.sum(-1)

    _check(_lowered(monkeypatch, compute, 2), 0, 1)


def test_layers_with_and_without_a_bias_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(x: Tensor, one: Layer, other: Layer) -> Tensor:
        condition = x[:, 0]
        return functional.linear(condition, *one).sum(-1) + functional.linear(condition, other[0]).sum(-1)

    _check(_lowered(monkeypatch, compute, 2), 0, 1)


def test_readers_that_merge_samples_find_contiguous_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(x: Tensor, *layers: Layer) -> Tensor:
        condition = x[:, 0]
        heads = [functional.linear(condition, *layer).reshape(-1, 3) for layer in layers]
        return functional.normalize(torch.cat(heads), dim=-1)

    _check(_lowered(monkeypatch, compute, 2), 0, 1)


def test_more_layers_than_an_operator_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    _check(_lowered(monkeypatch, _of_activations, kernels.most_siblings() + 1), 0, 2)


def _tokens(x: Tensor, *layers: Layer) -> Tensor:
    return torch.cat([functional.linear(x, *layer) for layer in layers], -1)  # [B, T, H]


def _flat_tokens(x: Tensor, *layers: Layer) -> Tensor:
    rows = x.reshape(-1, WIDTH)
    return torch.cat([functional.linear(rows, *layer) for layer in layers], -1)


def _unlike_rows(x: Tensor, *layers: Layer) -> Tensor:
    return torch.cat([functional.linear(x[:, number], *layer) for number, layer in enumerate(layers)], -1)


def _unlike_sizes(x: Tensor, one: Layer, other: Layer) -> Tensor:
    condition = x[:, 0]
    return torch.cat([functional.linear(condition, *one), functional.linear(condition, other[0][:4])], -1)


def _one_after_the_other(x: Tensor, one: Layer, other: Layer) -> Tensor:
    """A weight that the first layer's result is part of."""
    condition = x[:, 0]
    first = functional.linear(condition, *one)
    return functional.linear(condition, other[0] * first.mean())


def _results(x: Tensor, *layers: Layer) -> tuple[Tensor, ...]:
    condition = x[:, 0]
    return tuple(functional.linear(condition, *layer) for layer in layers)


@pytest.mark.parametrize(
    "compute", [_tokens, _flat_tokens, _unlike_rows, _unlike_sizes, _one_after_the_other, _results]
)
def test_what_is_no_sibling_stays(monkeypatch: pytest.MonkeyPatch, compute: Compute_) -> None:
    graph = _lowered(monkeypatch, compute, 2, Fastest(64))
    assert count_ops(graph, single) == 2
    _check(graph, 2, 0)


def test_layers_that_never_run_through_the_own_kernel_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _lowered(monkeypatch, _of_activations, 2, Fastest(0, 128))
    assert count_ops(graph, single) == 2
    _check(graph, 2, 0)


def test_one_call_for_all_modulations_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOWER_LINEAR, "fastest_linear", lambda *_, **__: Fastest(64))
    fast = zoo_pair("dsmoe-tiny")[1].with_policy(MoECa(interval=3))  # lowered anew
    (program,) = fast._moeca.programs.values()
    assert program.graphs is not None
    calls = program.graphs.full.graph.find_nodes(op="call_function", target=joined)
    assert [example_value(call).shape[0] for call in calls] == [len(program.sites.attention)], "a modulation a block"
