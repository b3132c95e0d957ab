"""The rewrite engine: stable order, dead code, copies of nodes, attributes that nothing reads."""

import operator
import random

import pytest
import torch
from torch import fx, nn

from moeca_fx.errors import PassError
from moeca_fx.graph import rewrite


def _chain(length: int = 6) -> fx.GraphModule:
    """x -> a0 -> a1 -> ...; every value also feeds the output."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    made = []
    for index in range(length):
        node = rewrite.call(graph, operator.add, node, 1, name=f"a{index}")
        made.append(node)
    graph.output(tuple(made))
    return fx.GraphModule(nn.Module(), graph)


def _names(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.nodes]


def test_a_sorted_graph_stays_as_it_is() -> None:
    module = _chain()
    before = _names(module)
    rewrite.sort_stably(module.graph)
    assert _names(module) == before


@pytest.mark.parametrize("seed", range(5))
def test_any_order_becomes_one_in_which_inputs_come_first(seed: int) -> None:
    module = _chain()
    before = _names(module)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    random.Random(seed).shuffle(calls)
    for node in calls:
        module.graph.output_node().prepend(node)
    rewrite.sort_stably(module.graph)
    module.graph.lint()
    assert _names(module) == before  # a chain has one order only


def test_unrelated_nodes_keep_their_order() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    left, right = (rewrite.call(graph, operator.neg, x, name=name) for name in ("left", "right"))
    late = rewrite.call(graph, operator.pos, x, name="late")
    graph.output((left, right, late))
    left.args = (late,)  # left needs what comes last
    rewrite.sort_stably(graph)
    assert [node.name for node in graph.nodes] == ["x", "late", "left", "right", "output"]


def test_a_circle_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(operator.neg, (x,))
    second = graph.call_function(operator.neg, (first,))
    first.args = (second,)
    graph.output(second)
    with pytest.raises(PassError, match="neg_1: expected inputs that come before it, found neg, which"):
        rewrite.sort_stably(graph)


def test_finish_drops_dead_nodes_and_the_attributes_they_read() -> None:
    root = nn.Module()
    root.inner = nn.Module()
    root.inner.dead = nn.Parameter(torch.ones(2))
    root.live = nn.Parameter(torch.ones(2))
    graph = fx.Graph()
    x, unused = graph.placeholder("x"), graph.placeholder("unused")
    rewrite.call(graph, operator.mul, x, graph.get_attr("inner.dead"), name="dead")
    graph.output((rewrite.call(graph, operator.mul, x, graph.get_attr("live"), name="kept"),))
    module = rewrite.finish(fx.GraphModule(root, graph), "a test")
    assert _names(module) == ["x", "unused", "live", "kept", "output"]  # inputs are the signature: they stay
    assert [name for name, _ in module.named_parameters()] == ["live"]
    assert unused.op == "placeholder"
    assert torch.equal(module(torch.full((2,), 3.0), None)[0], torch.full((2,), 3.0))


def test_finish_names_the_pass_that_left_an_illegal_graph() -> None:
    module = _chain(2)
    next(iter(module.graph.find_nodes(op="call_function", target=operator.add))).target = "no function"
    with pytest.raises(PassError, match="'broken' left an illegal graph"):
        rewrite.finish(module, "broken")


def test_clones_read_the_replacement_and_leave_the_originals() -> None:
    module = _chain(3)
    x, first, second, third, _ = module.graph.nodes
    with module.graph.inserting_before(module.graph.output_node()):
        start = rewrite.call(module.graph, operator.neg, x, name="start")
        copies = rewrite.clone_nodes(module.graph, [second, third], {first: start}, "again")
    assert copies[second].args == (start, 1) and copies[third].args == (copies[second], 1)
    assert copies[third].name == f"again_{third.name}"
    assert third.args == (second, 1) and second.args == (first, 1)


def test_call_takes_over_the_metadata_of_a_like_node() -> None:
    module = _chain(1)
    _, source, _ = module.graph.nodes
    source.meta.update(val=torch.ones(2), nn_module_stack={"0": ("L['self'].a.b", object)}, other=1)
    with module.graph.inserting_before(module.graph.output_node()):
        made = rewrite.call(module.graph, operator.neg, source, name="made", like=source)
    assert rewrite.example_value(made) is source.meta["val"] and "other" not in made.meta
    assert rewrite.module_path(made) == "a.b"
