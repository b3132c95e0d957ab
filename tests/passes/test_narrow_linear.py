"""narrow_linear: what nothing reads is not computed, what is read stays equal, whole readers keep the whole linear."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeca_fx import policies
from moeca_fx.graph.rewrite import example_value
from moeca_fx.passes.narrow_linear import narrow_linear
from tests.helpers import zoo_models
from tests.helpers.graphs import WIDTH, exported, stream
from tests.helpers.passes import check_pass
from tests.helpers.transformed import zoo_pair

LINEAR = torch.ops.aten.linear.default
SIX = 6 * WIDTH


class _Modulation(nn.Module):
    """A linear of six chunks, and what reads them."""

    def __init__(self, read: Callable[..., Tensor], bias: bool = True) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(WIDTH, SIX, bias=bias), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.linear(x))


def _widths(graph: torch.fx.GraphModule) -> list[int]:
    return [int(example_value(node).shape[-1]) for node in graph.graph.find_nodes(op="call_function", target=LINEAR)]


@pytest.mark.parametrize(
    ("read", "widths"),
    [
        (lambda y: y.chunk(6, -1)[2] + y.chunk(6, -1)[5], [WIDTH, WIDTH]),  # gates
        (lambda y: y.chunk(6, -1)[2] * y.chunk(6, -1)[3], [2 * WIDTH]),  # neighbours
        (lambda y: y[..., WIDTH : 3 * WIDTH] * 2, [2 * WIDTH]),  # sliced
        (lambda y: y.split([WIDTH, SIX - WIDTH], dim=2)[1], [SIX - WIDTH]),
        (lambda y: y.chunk(6, -1)[0] + y.split([WIDTH, SIX - WIDTH], -1)[0], [WIDTH]),  # one part, read twice
        (lambda y: y.chunk(6, 2)[0] + y.split(2 * WIDTH, 2)[2][..., :WIDTH], [WIDTH, WIDTH]),
    ],
    ids=["two gates", "neighbours", "sliced", "unlike sizes", "twice", "a part of a part"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_only_what_is_read_is_computed(read: Callable[..., Tensor], widths: list[int], bias: bool) -> None:
    graph = exported(_Modulation(read, bias), stream())
    examples = [(stream(seed=1),), (stream(5, seed=2),)]
    with torch.no_grad():
        after = check_pass(graph, narrow_linear, examples, {LINEAR: (1, len(widths))}, tolerance=1e-6)
    assert _widths(after) == widths
    if not bias:
        assert {len(node.args) for node in after.graph.find_nodes(op="call_function", target=LINEAR)} == {2}


@pytest.mark.parametrize(
    "read",
    [
        lambda y: sum(y.chunk(6, -1)),
        lambda y: y.chunk(6, -1)[2].sum(-1) + y.sum(-1),
        lambda y: y.chunk(5, 1)[2],  # of tokens
        lambda y: y,
    ],
    ids=["all parts", "a part and the whole", "tokens", "the whole"],
)
def test_what_is_read_whole_stays(read: Callable[..., Tensor]) -> None:
    graph = exported(_Modulation(read), stream())
    with torch.no_grad():
        check_pass(graph, narrow_linear, [(stream(seed=1),)], {LINEAR: (1, 1)})


def test_overlapping_parts_are_computed_once() -> None:
    def read(y: Tensor) -> Tensor:
        first, second = y.split([3 * WIDTH, 3 * WIDTH], -1)[0], y.split(2 * WIDTH, -1)[1]
        return first.sum(-1) + second.sum(-1)  # 0 .. 3 and 2 .. 4 widths

    graph = exported(_Modulation(read), stream())
    with torch.no_grad():
        after = check_pass(graph, narrow_linear, [(stream(seed=1),)], {LINEAR: (1, 1)}, tolerance=1e-6)
    assert _widths(after) == [4 * WIDTH]


def test_a_reused_sublayer_reads_its_gate_alone() -> None:
    _, fast = zoo_pair("dsmoe", policies.build("fora"))
    graphs: Any = fast._moeca.prepare(fast, zoo_models.inputs(), {}).graphs
    width = fast.config.hidden_size
    linears = [node for node in graphs.cached.graph.nodes if "linear" in str(node.target)]  # alone, or with siblings
    weights = [arg for node in linears for arg in node.args if "ada_ln" in str(arg) and "weight" in str(arg)]
    read = [int(example_value(weight).shape[0]) for weight in weights]
    blocks, final = 2 * fast.config.depth * [width], [2 * width]
    assert sorted(read) == sorted(blocks + final)
