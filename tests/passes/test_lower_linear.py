"""lower_linear: every dense fp32 linear of a CPU graph goes where it was measured to be fastest."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch.nn import functional

from moeca_fx import MoECa
from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops.cpu_gemm import Fastest
from moeca_fx.passes.lower_linear import lower_linear
from tests.helpers import zoo_models
from tests.helpers.compiled import Vectorized, vectorized
from tests.helpers.graphs import TOKENS, Compute, exported, stream
from tests.helpers.passes import check_pass
from tests.helpers.toys import toy, toy_inputs
from tests.helpers.transformed import zoo_pair

LOWER_LINEAR = import_module("moeca_fx.passes.lower_linear")  # the package has a function of that name
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
dense = torch.ops.aten.linear.default
lowered = torch.ops.moeca_cpu.chosen_linear.default if kernels.available() else None


@pytest.fixture(scope="module")
def made() -> Vectorized:
    return vectorized(toy(), toy_inputs())


Measured = Callable[[Fastest], None]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Set what the measurement finds."""
    return lambda found: monkeypatch.setattr(LOWER_LINEAR, "fastest_linear", lambda *_, **__: found)


@needs_kernels
@pytest.mark.parametrize("found", [Fastest(0, 1), Fastest(8, 18), Fastest(64, None), Fastest(4, 10_000)], ids=str)
def test_every_linear_of_the_graph(made: Vectorized, measured: Measured, found: Fastest) -> None:
    measured(found)
    count = 8  # valves, ask, keep, back, compass, and the shared expert's three
    with torch.no_grad():
        examples = [toy_inputs(seed=1), toy_inputs(5, seed=2)]
        ops = {dense: (count, 0), lowered: (0, count)}
        after = check_pass(made.module, lower_linear, examples, ops, tolerance=1e-5)
    limits = {node.args[3:] for node in after.graph.find_nodes(op="call_function", target=lowered)}
    assert limits == {(found.own_up_to, found.onednn_from)}


def test_nothing_where_the_default_is_as_fast(made: Vectorized, measured: Measured) -> None:
    measured(Fastest())
    with torch.no_grad():
        check_pass(made.module, lower_linear, [toy_inputs(seed=1)], {dense: (8, 8), lowered: (0, 0)})


@needs_kernels
def test_tokens_are_always_too_many_for_the_own_kernel(measured: Measured) -> None:
    measured(Fastest(TOKENS - 1))
    weight = torch.randn(4, 8)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight).sum(1) + functional.linear(x[:, 0], weight)  # [B, T, K], and [B, K]

    graph = exported(Compute(compute), stream())
    counts = {dense: (2, 1), lowered: (0, 1)}
    after = check_pass(graph, lower_linear, [(stream(seed=1),)], counts, tolerance=1e-5)
    (kept,) = after.graph.find_nodes(op="call_function", target=dense)
    assert kept.meta["val"].dim() == 3


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_of_one_input_is_a_product(measured: Measured, bias: bool) -> None:
    measured(Fastest(64))
    weight, added = torch.randn(6, 1), torch.randn(6) if bias else None

    def compute(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x[..., :1], weight, added) + functional.linear(x[:, :1, 0], weight, added).sum()

    with torch.no_grad():
        graph = exported(Compute(compute), stream())
        check_pass(graph, lower_linear, [(stream(seed=1),)], {dense: (2, 0), lowered: (0, 0)}, tolerance=1e-6)


def test_other_dtypes_are_left_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOWER_LINEAR, "fastest_linear", lambda *_, **__: pytest.fail("must not be measured"))
    weight = torch.randn(4, 8, dtype=torch.float64)
    graph = exported(Compute(lambda x: torch.nn.functional.linear(x, weight)), stream().double())
    check_pass(graph, lower_linear, [(stream(seed=1).double(),)], {dense: (1, 1), lowered: (0, 0)})


@pytest.mark.parametrize("found", [Fastest(), pytest.param(Fastest(64, 128), marks=needs_kernels)], ids=str)
def test_biases_of_tokens_are_added_apart(measured: Measured, found: Fastest) -> None:
    measured(found)
    weight, bias = torch.randn(4, 8), torch.randn(4)
    add = torch.ops.aten.add.Tensor

    def compute(x: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return linear(x, weight, bias).sum(1) + linear(x[:, 0], weight, bias)  # tokens [B, T, K], and [B, K]

    after = check_pass(
        exported(Compute(compute), stream()), lower_linear, [(stream(seed=1),)], {add: (1, 2)}, tolerance=1e-5
    )
    linears = [node for node in after.graph.nodes if node.target in (dense, lowered)]
    assert [len(node.args) > 2 and node.args[2] is not None for node in linears] == [False, True]


@needs_kernels
def test_each_weight_has_the_limits_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOWER_LINEAR, "fastest_linear", lambda values, *, rows_vary: Fastest(values))
    weight, other = torch.randn(40, 8), torch.randn(4, 40)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, weight), other)

    after = check_pass(exported(Compute(compute), stream()), lower_linear, [(stream(seed=1),)], {}, tolerance=1e-4)
    limits = [node.args[3] for node in after.graph.find_nodes(op="call_function", target=lowered)]
    assert limits == [320, 160]


@pytest.mark.parametrize("found", [Fastest(), pytest.param(Fastest(64), marks=needs_kernels)], ids=str)
def test_refreshed_rows_have_biases_apart_and_no_onednn(monkeypatch: pytest.MonkeyPatch, found: Fastest) -> None:
    monkeypatch.setattr(
        LOWER_LINEAR, "fastest_linear", lambda values, *, rows_vary: found if rows_vary else Fastest(8, 18)
    )
    fast = zoo_pair("dsmoe", None)[1].with_policy(MoECa(tau0=0.6))  # lowered anew
    graphs = fast._moeca.prepare(fast, zoo_models.inputs(), {}).graphs
    assert graphs is not None
    programs = [child for child in graphs.cached.children() if isinstance(child, torch.fx.GraphModule)]
    target = lowered if found.own_up_to else dense
    linears = [node for program in programs for node in program.graph.find_nodes(op="call_function", target=target)]
    assert linears
    sums = [node for node in linears if next(iter(node.users)).target is torch.ops.aten.add.Tensor]
    assert 0 < len(sums) < len(linears)  # attention has biases, routers have none
    if found.own_up_to:
        assert {node.args[2:] for node in linears} == {(None, 64, None)}
    else:
        assert {len(node.args) for node in linears} == {2}
