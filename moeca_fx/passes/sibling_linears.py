"""sibling_linears: dense layers of the same few rows run in one call.

    a = chosen_linear(silu(c), Wa, ba, ..)        both = sibling_linears(silu(c), .., Wa, ba, Wb, bb)
    b = chosen_linear(silu(c), Wb, bb, ..)   -->  a, b = both[:, :N], both[:, N:]

Every block of an adaLN model makes its modulation of one condition [B, H]: on a CPU that is a wait for all threads and
a transposition of the same rows for each, where a cached step computes little else. Layers are siblings when they read
the same rows, or the same pointwise function of the same value, and would choose their kernel alike. Rows that are
tokens stay apart: they pay for a call of their own.
"""

import sys
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, example_value, sort_stably
from moeca_fx.kernels.cpu.ops import MOST_SIBLINGS

aten = torch.ops.aten
_MOST_ROWS = 64  # that the kernel takes at once


def sibling_linears(module: fx.GraphModule) -> int:
    """Join all siblings of the graph that `lower_linear` left, in place; returns how many layers were joined."""
    families: dict[Any, list[fx.Node]] = {}
    for node in module.graph.nodes:
        limits = _limits(node)
        if limits is not None and _rows_are_few(_rows(node)):
            families.setdefault((_origin(_rows(node)), limits), []).append(node)
    count = 0
    for family in families.values():
        for first in range(0, len(family), MOST_SIBLINGS):
            count += _join(module.graph, family[first : first + MOST_SIBLINGS])
    if count:
        sort_stably(module.graph)
        module.graph.lint()
        module.recompile()
    return count


def _limits(node: fx.Node) -> tuple[Any, ...] | None:
    """How a layer chooses its kernel by the number of rows; None for what is no such layer."""
    name = str(node.target)  # there may be no such operators
    if name == "moeca_cpu.linear.default":
        return (sys.maxsize, None)
    return tuple(node.args[3:]) if name == "moeca_cpu.chosen_linear.default" else None


def _rows(layer: fx.Node) -> fx.Node:
    x = layer.args[0]
    assert isinstance(x, fx.Node), "a layer's rows are a node"
    return x


def _rows_are_few(x: fx.Node) -> bool:
    """Whether rows [R, K] are the samples of the batch and nothing of which a sample has several."""
    rows = example_value(x)
    if not isinstance(rows, torch.Tensor) or rows.dim() != 2:
        return False
    count = rows.shape[0]
    return count <= _MOST_ROWS if isinstance(count, int) else bool(count.node.expr.is_symbol)


def _origin(x: fx.Node) -> Any:
    """What two values share that are the same: the node, or a pointwise function and what it is of."""
    if isinstance(x.target, torch._ops.OpOverload) and torch.Tag.pointwise in x.target.tags:
        return (x.target, x.args, tuple(x.kwargs.items()))
    return x


def _join(graph: fx.Graph, family: list[fx.Node]) -> int:
    """Put one call in the place of several layers; returns of how many, and leaves a single one alone."""
    if len(family) == 1:
        return 0
    first = family[0]
    layers = [value for node in family for value in node.args[1:3]]
    widths = [example_value(node).shape[1] for node in family]
    with graph.inserting_before(first):
        target = torch.ops.moeca_cpu.sibling_linears.default
        arguments = (_rows(first), *(_limits(first) or ()), *layers)
        made = call(graph, target, *arguments, name=f"{first.name}_siblings", like=first)
        made.meta["val"] = example_value(first).new_empty(example_value(first).shape[0], sum(widths))
    start = 0
    for node, width in zip(family, widths, strict=True):
        with graph.inserting_before(node):
            part = call(graph, aten.slice.Tensor, made, 1, start, start + width, name=f"{node.name}_part", like=node)
        node.replace_all_uses_with(part)
        rows = _rows(node)
        graph.erase_node(node)
        if not rows.users:
            graph.erase_node(rows)
        start += width
    return len(family)
