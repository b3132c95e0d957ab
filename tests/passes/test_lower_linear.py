"""lower_linear: all dense fp32 linears of a CPU graph or none, by what was measured."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch

from moeca_fx import MoECa
from moeca_fx.ops import cpu_gemm
from moeca_fx.passes.lower_linear import lower_linear
from tests.helpers import zoo_models
from tests.helpers.compiled import Vectorized, vectorized
from tests.helpers.graphs import Compute, exported, stream
from tests.helpers.passes import check_pass
from tests.helpers.toys import toy, toy_inputs
from tests.helpers.transformed import zoo_pair

LOWER_LINEAR = import_module("moeca_fx.passes.lower_linear")  # the package has a function of that name
needs_onednn = pytest.mark.skipif(
    not cpu_gemm.has_onednn(), reason="this torch has no oneDNN linear, or there is no C++ compiler"
)
dense = torch.ops.aten.linear.default
lowered = torch.ops.moeca_cpu.onednn_linear.default if cpu_gemm.has_onednn() else None


@pytest.fixture(scope="module")
def made() -> Vectorized:
    return vectorized(toy(), toy_inputs())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Set what the measurement finds."""
    return lambda rows: monkeypatch.setattr(LOWER_LINEAR, "onednn_from_rows", lambda: rows)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 18, 10_000])
def test_every_linear_of_the_graph(made: Vectorized, measured: Callable[[int | None], None], rows: int) -> None:
    measured(rows)
    count = 8  # valves, ask, keep, back, compass, and the shared expert's three
    with torch.no_grad():
        examples = [toy_inputs(seed=1), toy_inputs(5, seed=2)]
        ops = {dense: (count, 0), lowered: (0, count)}
        after = check_pass(made.module, lower_linear, examples, ops, tolerance=1e-5)
    assert {node.args[3] for node in after.graph.find_nodes(op="call_function", target=lowered)} == {rows}


def test_nothing_where_the_default_is_as_fast(made: Vectorized, measured: Callable[[int | None], None]) -> None:
    measured(None)
    with torch.no_grad():
        check_pass(made.module, lower_linear, [toy_inputs(seed=1)], {dense: (8, 8), lowered: (0, 0)})


def test_other_dtypes_are_left_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOWER_LINEAR, "onednn_from_rows", lambda: pytest.fail("must not be measured"))
    weight = torch.randn(4, 8, dtype=torch.float64)
    graph = exported(Compute(lambda x: torch.nn.functional.linear(x, weight)), stream().double())
    check_pass(graph, lower_linear, [(stream(seed=1).double(),)], {dense: (1, 1), lowered: (0, 0)})


def test_biases_of_tokens_are_added_apart(measured: Callable[[int | None], None]) -> None:
    measured(None)
    weight, bias = torch.randn(4, 8), torch.randn(4)
    add = torch.ops.aten.add.Tensor

    def compute(x: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return linear(x, weight, bias).sum(1) + linear(x[:, 0], weight, bias)  # tokens [B, T, K], and [B, K]

    after = check_pass(
        exported(Compute(compute), stream()), lower_linear, [(stream(seed=1),)], {add: (1, 2)}, tolerance=1e-5
    )
    assert [len(node.args) for node in after.graph.find_nodes(op="call_function", target=dense)] == [2, 3]


@pytest.mark.parametrize("rows", [None, 18])
def test_biases_of_refreshed_rows_are_added_apart(measured: Callable[[int | None], None], rows: int | None) -> None:
    measured(rows)
    _, fast = zoo_pair("dsmoe", MoECa(tau0=0.6))
    graphs = fast._moeca.prepare(fast, zoo_models.inputs(), {}).graphs
    assert graphs is not None
    programs = [child for child in graphs.cached.children() if isinstance(child, torch.fx.GraphModule)]
    linears = [node for program in programs for node in program.graph.find_nodes(op="call_function", target=dense)]
    assert {len(node.args) for node in linears} == {2}
    sums = [node for node in linears if next(iter(node.users)).target is torch.ops.aten.add.Tensor]
    assert 0 < len(sums) < len(linears)  # attention has biases, routers have none
    assert not any(program.graph.find_nodes(op="call_function", target=lowered) for program in programs)
