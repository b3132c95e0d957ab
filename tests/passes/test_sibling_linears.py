"""sibling_linears: layers of the same samples in one call, results unchanged; tokens and strangers stay apart."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from moeca_fx import MoECa
from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops.cpu_gemm import Fastest
from moeca_fx.passes.lower_linear import lower_linear
from moeca_fx.passes.sibling_linears import sibling_linears
from tests.helpers.graphs import WIDTH, Compute, exported, stream
from tests.helpers.passes import check_pass, count_ops
from tests.helpers.transformed import zoo_pair

pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
single = torch.ops.moeca_cpu.chosen_linear.default if kernels.available() else None
joined = torch.ops.moeca_cpu.sibling_linears.default if kernels.available() else None
LOWER_LINEAR = import_module("moeca_fx.passes.lower_linear")  # the package has a function of that name


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own kernels for up to three rows."""
    monkeypatch.setattr(LOWER_LINEAR, "fastest_linear", lambda *_, **__: Fastest(3))


def _graph(compute: Callable[..., Tensor], count: int, bias: bool = True, width: int = WIDTH) -> fx.GraphModule:
    """A graph over some layers of 3, 4, .. outputs, lowered."""
    weights = {f"w{i}": torch.randn(3 + i, width) for i in range(count)}
    biases = {f"b{i}": torch.randn(3 + i) for i in range(count)} if bias else {}

    def run(x: Tensor, **given: Tensor) -> Tensor:
        layers = [(given[f"w{i}"], given.get(f"b{i}")) for i in range(count)]
        return compute(x, *layers)

    graph = exported(Compute(run, **weights, **biases), stream())
    lower_linear(graph)
    return graph


def _check(graph: fx.GraphModule, before: int, left: int, calls: int) -> fx.GraphModule:
    examples = [(stream(2, seed=1),), (stream(5, seed=2),)]  # within the own kernel's rows, and beyond
    with torch.no_grad():
        return check_pass(graph, sibling_linears, examples, {single: (before, left), joined: (0, calls)}, 1e-5)


def _of_activations(x: Tensor, *layers: tuple[Tensor, Tensor | None]) -> Tensor:
    condition = x[:, 0]  # [B, H]
    return torch.cat([functional.linear(functional.silu(condition), *layer) for layer in layers], -1)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_condition(bias: bool) -> None:
    after = _check(_graph(_of_activations, 3, bias), 3, 0, 1)
    assert count_ops(after, torch.ops.aten.silu.default) == 1, "the activation is computed once"


def test_layers_with_and_without_a_bias_are_one_call() -> None:
    def compute(x: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
        condition = x[:, 0]
        return functional.linear(condition, *one).sum(-1) + functional.linear(condition, other[0]).sum(-1)

    _check(_graph(compute, 2), 2, 0, 1)


def test_more_layers_than_an_operator_takes() -> None:
    count = kernels.MOST_SIBLINGS + 1
    _check(_graph(_of_activations, count), count, 1, 1)


def test_what_is_no_sibling_stays() -> None:
    def compute(x: Tensor, *layers: tuple[Tensor, Tensor | None]) -> Tensor:
        first, second, third, fourth = layers
        tokens = functional.linear(x, *first).sum((1, 2)) + functional.linear(x, *second).sum((1, 2))  # [B, T, H]
        rows = x.reshape(-1, WIDTH)  # as many as tokens
        of_rows = functional.linear(rows, *third).sum() + functional.linear(rows, *fourth).sum()
        unlike = functional.linear(x[:, 0], *first).sum(-1) + functional.linear(x[:, 1], *second).sum(-1)
        return tokens + of_rows + unlike

    graph = _graph(compute, 4)
    count = count_ops(graph, single)
    assert count >= 4
    _check(graph, count, count, 0)


def test_one_call_for_all_modulations_of_a_model() -> None:
    _, fast = zoo_pair("dsmoe-tiny", MoECa(interval=3))
    (program,) = fast._moeca.programs.values()
    assert program.graphs is not None
    for module in program.graphs.modules().values():
        (call,) = module.graph.find_nodes(op="call_function", target=joined)
        blocks = len(program.sites.attention)
        assert sum(value is not None for value in call.args[3::2]) >= blocks
