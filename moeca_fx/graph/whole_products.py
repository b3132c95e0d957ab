"""Products that an expert computes in slices, as one product each.

    cat([linear(x, W0), linear(x, W1), ..], -1)     W0, W1, .. = split(W, outputs)   -->   linear(x, W)
    linear(h0, W0) + linear(h1, W1) + ..            W0, W1, .. = split(W, inputs),   -->   linear(h, W)
                                                    h0, h1, .. = split(h)

Published models slice their experts as they were trained (`pretraining_tp`); in the second form the sum over inputs
is taken in another order.
"""

import operator
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import evaluate
from moeca_fx.ops.grouped_linear import grouped_linear

aten = torch.ops.aten
_GROUPED = grouped_linear._opoverload
_OUTPUTS, _INPUTS = 1, 2  # axes of a stacked weight [E, outputs, inputs]


def whole_products(program: fx.GraphModule) -> None:
    """Join the slices of every product of an expert program, in place."""
    for node in list(program.graph.nodes):
        joined = _joined_outputs(program, node) or _joined_inputs(program, node)
        if joined is None:
            continue
        with program.graph.inserting_before(node):
            whole = program.graph.call_function(_GROUPED, joined)
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.recompile()


def _joined_outputs(program: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    """Operands of the one product that a concatenation of products is."""
    if node.target is not aten.cat.default or tuple(node.args[1:]) != (-1,):
        return None
    parts = list(node.args[0])  # type: ignore[arg-type]  # a list of nodes
    if not _are_products(parts) or len({part.args[0] for part in parts}) != 1:
        return None
    weight = _split_in_order(program, [part.args[1] for part in parts], _OUTPUTS)
    return None if weight is None else (parts[0].args[0], weight, None, parts[0].args[3])


def _joined_inputs(program: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    """Operands of the one product that a sum of products is."""
    if node.target is not aten.add.Tensor or any(user.target is aten.add.Tensor for user in node.users):
        return None  # the last addition sees all of the sum
    parts = _addends(node)
    if not _are_products(parts):
        return None
    slices = [(part.args[0], part.args[1]) for part in parts]
    if any(hidden.target is not operator.getitem for hidden, _ in slices):
        return None
    slices.sort(key=lambda pair: pair[0].args[1])
    source = slices[0][0].args[0]
    weight = _split_in_order(program, [weight for _, weight in slices], _INPUTS)
    if weight is None or source.target is not aten.split.Tensor or source.args[2:] != (-1,):
        return None
    same_cut = source.args[1] == slices[0][1].args[0].args[1]
    in_order = [pair[0].args for pair in slices] == [(source, index) for index in range(len(slices))]
    return (source.args[0], weight, None, parts[0].args[3]) if same_cut and in_order else None


def _addends(node: Any) -> list[Any]:
    if isinstance(node, fx.Node) and node.target is aten.add.Tensor and not node.kwargs:
        return [part for operand in node.args for part in _addends(operand)]
    return [node]


def _are_products(parts: list[Any]) -> bool:
    """Whether all are grouped linears without bias that nothing else reads."""
    return len(parts) > 1 and all(
        isinstance(part, fx.Node) and part.target is _GROUPED and part.args[2] is None and len(part.users) == 1
        for part in parts
    )


def _split_in_order(program: fx.GraphModule, parts: list[Any], axis: int) -> fx.Node | None:
    """The weight that `parts` are all slices of, in order; None where they are not."""
    if any(part.target is not operator.getitem for part in parts):
        return None
    source = parts[0].args[0]
    if [part.args for part in parts] != [(source, index) for index in range(len(parts))]:
        return None
    if source.target is not aten.split.Tensor or source.args[2:] != (axis,):
        return None
    weight, size = source.args[:2]
    whole = evaluate(program, weight).shape[axis]
    return weight if whole == size * len(parts) else None
