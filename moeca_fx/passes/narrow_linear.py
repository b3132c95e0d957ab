"""narrow_linear: a linear computes only the outputs that something reads.

    y    = linear(c, W, b)                     y = linear(c, W[2H:3H], b[2H:3H])
    gate = split(y, H, -1)[2]          -->     gate = y

A step that reuses a sublayer reads the gate of its modulation and neither shift nor scale. Rows of a weight are a view
of it, so that nothing is copied; each run of neighbouring outputs is a product of its own.
"""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.last_axis import SPLITS, Part, part_of
from moeca_fx.graph.rewrite import call, example_value
from moeca_fx.graph.slicing import LINEAR

aten = torch.ops.aten


def narrow_linear(module: fx.GraphModule) -> int:
    """Narrow every linear of the graph that computes what nothing reads, in place; returns how often."""
    count, linears = 0, [node for node in module.graph.nodes if node.target in LINEAR]
    while linears:
        node = linears.pop()
        parts = _parts(node)
        if parts and sum(end - start for start, end in _runs(parts)) < example_value(node).shape[-1]:
            linears += _rewrite(module.graph, node, parts)  # a part of a part may be all that is read
            count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _parts(node: fx.Node) -> list[Part]:
    """Every part that is read; empty where something reads the whole result."""
    if not isinstance(example_value(node), torch.Tensor):
        return []
    parts = [part_of(reader) for reader in _readers(node)]
    found = [part for part in parts if part is not None and part.source is node]
    return found if len(found) == len(parts) else []


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, or an element of the list that it is split into."""
    return [reader for user in node.users for reader in (user.users if user.target in SPLITS else [user])]


def _runs(parts: list[Part]) -> list[tuple[int, int]]:
    """Outputs that are read, neighbours and overlaps together, in ascending order."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted({(part.start, part.end) for part in parts}):
        if runs and start <= runs[-1][1]:
            start, before = runs.pop()
            end = max(end, before)
        runs.append((start, end))
    return runs


def _rewrite(graph: fx.Graph, node: fx.Node, parts: list[Part]) -> list[fx.Node]:
    """The linears in its place."""
    narrowed = []
    target: Any = node.target
    x, weight, *rest = node.args
    for start, end in _runs(parts):
        with graph.inserting_before(node):
            narrow = [_rows(graph, value, start, end) for value in (weight, *rest)]
            made = call(graph, target, x, *narrow, name=f"{node.name}_from_{start}", like=node)
            made.meta["val"] = example_value(node)[..., start:end]
        narrowed.append(made)
        for part in parts:
            if start <= part.start < end:
                part.node.replace_all_uses_with(_piece(graph, made, part, start, end))
    for dead in (*_readers(node), *(user for user in node.users if user.target in SPLITS), node):
        graph.erase_node(dead)
    return narrowed


def _rows(graph: fx.Graph, value: Any, start: int, end: int) -> Any:
    """The rows of a weight or a bias that belong to some outputs; None stays."""
    if value is None:
        return None
    rows = call(graph, aten.slice.Tensor, value, 0, start, end, name=f"{value.name}_from_{start}", like=value)
    if isinstance(example_value(value), torch.Tensor):
        rows.meta["val"] = example_value(value)[start:end]
    return rows


def _piece(graph: fx.Graph, made: fx.Node, part: Part, start: int, end: int) -> fx.Node:
    """What `part` reads, of the linear that computes the outputs `start` .. `end`."""
    if (part.start, part.end) == (start, end):
        return made
    with graph.inserting_before(part.node):
        arguments = (made, -1, part.start - start, part.end - start)
        return call(graph, aten.slice.Tensor, *arguments, name=f"{part.node.name}_piece", like=part.node)
