"""normalize: each rule once, the numbers unchanged bit for bit, and nothing left for a second run."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from moeca_fx.graph.legality import check
from moeca_fx.passes.normalize import normalize
from tests.helpers.graphs import Compute, exported, stream
from tests.helpers.passes import Stage, check_pass, count_ops
from tests.helpers.toys import toy_inputs

aten = torch.ops.aten
EXAMPLES = [(stream(3, seed=1),), (stream(5, seed=2),)]


def _graph(function: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    with torch.no_grad():
        return exported(Compute(function), stream(), decompose=False)


def _in_full_precision(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x.float() @ x.float().transpose(1, 2)
        z = y * 2
    return torch.cat([y, z], dim=-1) + 1


def _with_grad_switched(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x * 3
    return y + 1


def _higher_order(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if "wrap_with" in str(node.target)]


@pytest.mark.parametrize(
    ("function", "call"),
    [(_in_full_precision, "wrap_with_autocast"), (_with_grad_switched, "wrap_with_set_grad_enabled")],
)
def test_bodies_of_higher_order_calls_are_inlined(function: Callable[[Tensor], Tensor], call: str) -> None:
    graph = _graph(function)
    assert _higher_order(graph) == [call]
    after = check_pass(graph, normalize, EXAMPLES, {aten.mul.Tensor: (0, 1), aten.add.Tensor: (1, 1)})
    assert _higher_order(after) == []
    check("normalize", after)


def test_two_calls_are_inlined_independently() -> None:
    graph = _graph(lambda x: _with_grad_switched(_with_grad_switched(x)))
    assert len(_higher_order(graph)) == 2
    after = check_pass(graph, normalize, EXAMPLES, {aten.mul.Tensor: (0, 2), aten.add.Tensor: (2, 2)})
    assert _higher_order(after) == []


def test_enabled_autocast_is_left_and_then_illegal() -> None:
    def halved(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.transpose(1, 2)

    after = normalize(_graph(halved))
    assert _higher_order(after) == ["wrap_with_autocast"]
    with pytest.raises(Exception, match="higher-order calls"):
        check("normalize", after)


def test_slices_start_at_a_number() -> None:
    graph = _graph(lambda x: torch.slice_copy(x, 2, 0, 4) + 1)
    (node,) = graph.graph.find_nodes(op="call_function", target=aten.slice_copy.Tensor)
    node.target, node.args = aten.slice.Tensor, (node.args[0], 2, None, 4)
    graph.recompile()
    after = check_pass(graph, normalize, EXAMPLES, {aten.slice.Tensor: (1, 1)})
    (node,) = after.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    assert node.args[1:] == (2, 0, 4)


def test_dropout_that_is_off_goes() -> None:
    graph = _graph(lambda x: torch.dropout(torch.dropout(x, 0.1, False), 0.0, True) * 2)
    check_pass(graph, normalize, EXAMPLES, {aten.dropout.default: (2, 0), aten.mul.Tensor: (1, 1)})


def test_dropout_that_is_on_stays() -> None:
    after = normalize(_graph(lambda x: torch.dropout(x, 0.5, True)))
    assert count_ops(after, aten.dropout.default) == 1


def test_copies_go_but_changes_of_layout_stay() -> None:
    def copies(x: Tensor) -> Tensor:
        return x.clone() + x.transpose(1, 2).clone(memory_format=torch.contiguous_format).sum()

    check_pass(_graph(copies), normalize, EXAMPLES, {aten.clone.default: (2, 1)})


def test_assertions_go() -> None:
    graph = _graph(lambda x: x.to(torch.float64).float() * 2)
    target = aten._assert_tensor_metadata.default
    before = count_ops(graph, target)
    assert before > 0
    check_pass(graph, normalize, EXAMPLES, {target: (before, 0)})


def test_a_whole_model(toy_stage: Stage) -> None:
    with torch.no_grad(), toy_stage.live():
        examples = [toy_inputs(seed=1), toy_inputs(5, seed=2)]
        marker = torch.ops.moeca.experts.default
        check_pass(toy_stage.captured.module, normalize, examples, {marker: (2, 2)})
