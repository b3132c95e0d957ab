"""sibling_linears: dense layers of the same few rows run in one call.

    a = chosen_linear(silu(c), Wa, ba, ..)        both = sibling_linears(silu(c), .., Wa, ba, Wb, bb)  [2, B, N]
    b = chosen_linear(silu(c), Wb, bb, ..)   -->  a, b = both[0], both[1]

Every block of an adaLN model makes its modulation of one condition [B, H]: on a CPU that is a wait for all threads and
a transposition of the same rows for each, where a cached step computes little else. Layers are siblings when they have
as many outputs, read the same rows, or the same pointwise function of the same value, and would choose their kernel
alike; each result is as contiguous as before. Rows that are tokens stay apart: they pay for a call of their own.
"""

import math
import sys
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, example_value, sort_stably
from moeca_fx.graph.slicing import RESHAPES
from moeca_fx.kernels.cpu.ops import most_siblings

aten = torch.ops.aten
_MOST_ROWS = 64  # that the kernel takes at once
_PIECES = (aten.slice.Tensor, *RESHAPES)


def sibling_linears(module: fx.GraphModule) -> int:
    """Join all siblings of the graph that `lower_linear` left, in place; returns how many layers were joined."""
    families: dict[Any, list[fx.Node]] = {}
    sizes = _input_sizes(module.graph)
    for node in module.graph.nodes:
        limits = _limits(node)
        if limits is not None and _rows_are_few(node, limits, sizes) and _may_be_joined(node):
            key = (_origin(_operand(node)), limits, example_value(node).shape[1])
            families.setdefault(key, []).append(node)
    count = 0
    for (_, limits, _), family in families.items():
        calls = math.ceil(len(family) / most_siblings())
        each = math.ceil(len(family) / calls)  # so that none is left alone
        for first in range(0, len(family), each):
            count += _join(module.graph, family[first : first + each], limits)
    if count:
        sort_stably(module.graph)
        module.graph.lint()
        module.recompile()
    return count


def _limits(node: fx.Node) -> tuple[Any, ...] | None:
    """How a layer chooses its kernel by the number of rows; None for what never runs through the own one."""
    name = str(node.target)  # there may be no such operators
    if name == "moeca_cpu.linear.default":
        return (sys.maxsize, None)
    return tuple(node.args[3:]) if name == "moeca_cpu.chosen_linear.default" and node.args[3] else None


def _operand(layer: fx.Node) -> fx.Node:
    """The rows that a layer reads."""
    x = layer.args[0]
    assert isinstance(x, fx.Node), "a layer's rows are a node"
    return x


def _input_sizes(graph: fx.Graph) -> set[Any]:
    """What the first sizes of the graph's inputs are called, where they are open: the batch."""
    values = [example_value(node) for node in graph.find_nodes(op="placeholder")]
    first: list[Any] = [value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.dim()]
    return {size.node.expr for size in first if not isinstance(size, int)}


def _rows_are_few(layer: fx.Node, limits: tuple[Any, ...], sizes: set[Any]) -> bool:
    """Whether rows [R, K] are the samples of the batch and nothing of which a sample has several."""
    rows = example_value(_operand(layer))
    if not isinstance(rows, torch.Tensor) or rows.dim() != 2:
        return False
    count: Any = rows.shape[0]
    return bool(count <= min(_MOST_ROWS, limits[0])) if isinstance(count, int) else count.node.expr in sizes


def _may_be_joined(layer: fx.Node) -> bool:
    """Whether its weight is there before any layer runs, and its result is none of the graph's."""
    constant = all(_is_constant(value) for value in layer.args[1:3] if value is not None)
    return constant and all(user.op != "output" for user in layer.users)


def _is_constant(value: Any) -> bool:
    """Whether a value is a tensor of the module, or a piece of one."""
    while isinstance(value, fx.Node) and value.target in _PIECES:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _origin(x: fx.Node) -> Any:
    """What two values share that are the same: the node, or a pointwise function and what it is of."""
    if isinstance(x.target, torch._ops.OpOverload) and torch.Tag.pointwise in x.target.tags:
        return (x.target, x.args, tuple(x.kwargs.items()))
    return x


def _join(graph: fx.Graph, family: list[fx.Node], limits: tuple[Any, ...]) -> int:
    """Put one call in the place of several layers; returns of how many, and leaves a single one alone."""
    if len(family) == 1:
        return 0
    first = family[0]
    layers = [value for node in family for value in node.args[1:3]]
    with graph.inserting_before(first):
        target = torch.ops.moeca_cpu.sibling_linears.default
        made = call(graph, target, _operand(first), *limits, *layers, name=f"{first.name}_siblings", like=first)
        made.meta["val"] = example_value(first).new_empty(len(family), *example_value(first).shape)
    for number, node in enumerate(family):
        with graph.inserting_before(node):
            part = call(graph, aten.select.int, made, 0, number, name=f"{node.name}_part", like=node)
        node.replace_all_uses_with(part)
        rows = _operand(node)
        graph.erase_node(node)
        if not rows.users:
            graph.erase_node(rows)
    return len(family)
