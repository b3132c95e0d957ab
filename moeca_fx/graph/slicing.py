"""Slices of a graph: ancestors, the nodes between two points, and the residual addition that closes a sublayer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moeca_fx.graph.rewrite import example_value

aten = torch.ops.aten
LINEAR = (aten.linear.default,)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class Residual:
    """``residual_out = residual_in + gate * output``; `gate` is None when nothing multiplies `output`."""

    output: fx.Node
    gate: fx.Node | None
    residual_in: fx.Node
    residual_out: fx.Node


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node that `nodes` are computed from, without themselves unless one feeds another."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def between(roots: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Nodes that depend on a root and feed an output, outputs included, roots excluded, in graph order."""
    roots, outputs = list(roots), list(outputs)
    feeding = ancestors(outputs) | set(outputs)
    reached = set(roots)
    inside: list[fx.Node] = []
    for node in outputs[0].graph.nodes:
        if node in feeding and node not in roots and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            inside.append(node)
    return inside


def same_shape(left: fx.Node, right: fx.Node) -> bool:
    """Whether two nodes hold tensors of equal shape."""
    a, b = example_value(left), example_value(right)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape


def closing_residual(core: fx.Node) -> Residual | None:
    """The first addition after `core` whose other operand is an ancestor of `core` with equal shape."""
    return next(closing_residuals(core), None)


def closing_residuals(core: fx.Node) -> Iterator[Residual]:
    """One such addition for every token stream: the first that `core` reaches on each."""
    before = ancestors([core])
    reached = {core}
    closed: set[fx.Node] = set()
    passed_core = False
    for node in core.graph.nodes:
        if node is core:
            passed_core = True
            continue
        if not passed_core or not any(source in reached for source in node.all_input_nodes):
            continue
        found = _closes(node, before, reached)
        if found is not None:  # what follows reads another stream than `core` did
            if found.residual_in not in closed:
                yield found
            closed.add(found.residual_in)
        else:
            reached.add(node)


def _closes(node: fx.Node, before: set[fx.Node], reached: set[fx.Node]) -> Residual | None:
    operands = addends(node)
    for branch, other in (operands, operands[::-1]) if operands is not None else ():
        if branch in reached and other in before and same_shape(node, other):
            return with_gate(node, other, branch, reached)
    return None


def addends(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two node operands of a plain addition; None for anything else (scaled additions too)."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def with_gate(addition: fx.Node, stream: fx.Node, branch: fx.Node, reached: set[fx.Node]) -> Residual:
    """Split `branch` into gate and output when its last operation multiplies by something from outside `reached`."""
    if branch.target is aten.mul.Tensor:
        left, right = branch.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            for output, gate in ((left, right), (right, left)):
                if output in reached and gate not in reached and same_shape(output, branch):
                    return Residual(output, gate, stream, addition)
    return Residual(branch, None, stream, addition)


def strip_reshapes(node: fx.Node) -> fx.Node:
    """Walk back over views, so that several reshaped readers of one tensor share a root."""
    while node.target in RESHAPES:
        source = node.args[0]
        assert isinstance(source, fx.Node), f"{node.name}: a reshape reads a node"
        node = source
    return node
