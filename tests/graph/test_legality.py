"""After each stage, each rule finds the node that must not be there, and names it."""

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from moeca_fx.errors import PassError
from moeca_fx.graph.legality import check
from moeca_fx.passes import PIPELINE

aten = torch.ops.aten


def _marker(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_function(torch.ops.moeca.experts.default, (x, x, x, "key"))


def _open_slice(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_function(aten.slice.Tensor, (x, 1, None, 8))


def _assertion(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_function(aten._assert_tensor_metadata.default, (x,))


def _autocast(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_function(torch.ops.higher_order.wrap_with_autocast, ("cpu", None, False, None, x))


def _method(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_method("relu", (x,))


def _submodule(graph: fx.Graph, x: fx.Node) -> None:
    graph.call_module("inner", (x,))


AFTER_NORMALIZE = (
    "normalize",
    "locate",
    "vectorize_experts",
    "pack_stream",
    "insert_cache",
    "lower_linear",
    "pair_rotary",
    "lower_kernels",
    "lower_inplace",
)
AFTER_VECTORIZE = AFTER_NORMALIZE[2:]
PLANTED: list[tuple[Callable[[fx.Graph, fx.Node], None], tuple[str, ...], str]] = [
    (_marker, AFTER_VECTORIZE, "experts markers must be lowered"),
    (_open_slice, AFTER_NORMALIZE, "a slice must start at a number"),
    (_assertion, AFTER_NORMALIZE, "metadata assertions must be gone"),
    (_autocast, AFTER_NORMALIZE, "higher-order calls"),
    (_method, ("capture",), "only functions, attributes and inputs may be captured"),
    (_submodule, ("capture",), "only functions, attributes and inputs may be captured"),
]
STAGES = [name for name, _ in PIPELINE]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("plant", "stages", "reason"), PLANTED, ids=[plant.__name__ for plant, _, _ in PLANTED])
def test_a_planted_node_is_found_where_it_is_illegal(
    plant: Callable[[fx.Graph, fx.Node], None], stages: tuple[str, ...], reason: str, stage: str
) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    plant(graph, x)
    graph.output((x,))
    root = nn.Module()
    root.inner = nn.Identity()
    module = fx.GraphModule(root, graph)
    if stage in stages:
        with pytest.raises(PassError, match=reason) as caught:
            check(stage, module)
        assert f"after pass {stage!r}: node " in str(caught.value)
    else:
        check(stage, module)
