"""Whether a router may leave slots without an expert: whether anything replaces ids after they were chosen.

    scores, ids = topk(scores, k)                      in range whatever the input: no slot is empty
    ids         = where(scores < floor, E, ids)        may be out of range at inputs that nobody has seen yet

A probe run shows only its own input, so what a graph could do counts too. It costs only where it is so.
"""

from collections.abc import Iterator

import torch
from torch import fx

from moeca_fx.graph.rewrite import example_value

aten = torch.ops.aten
_REPLACES = (
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.index_put.default,
    aten.scatter.src,
    aten.scatter.value,
)

_CHOOSES = {aten.topk.default: 2, aten.argmax.default: 1, aten.max.dim: 1}  # position of the dimension


def may_be_empty(expert: fx.Node) -> bool:
    """Follow ids back to what chose them.

    Args:
        expert: the experts' operand with the ids, in the captured graph.
    """
    return any(node.target in _REPLACES for node in _makers(expert))


def columns(expert: fx.Node) -> int:
    """Among how many the ids were chosen, as far as the graph shows; 0 where it does not."""
    found = 0
    for node in _makers(expert):
        if node.target in _CHOOSES:
            source, dim = (
                node.args[0],
                node.args[_CHOOSES[node.target]] if len(node.args) > _CHOOSES[node.target] else -1,
            )
            assert isinstance(source, fx.Node), f"{node.name}: chooses among a tensor"
            size = example_value(source).shape[dim if isinstance(dim, int) else -1]
            found = max(found, size if isinstance(size, int) else 0)
    return found


def _makers(expert: fx.Node) -> Iterator[fx.Node]:
    """Nodes that ids come from, back to those that chose them."""
    seen: set[fx.Node] = set()
    stack = [expert]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = example_value(node)
        if node.target in _CHOOSES:
            yield node
        elif isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32):
            yield node
            stack.extend(node.all_input_nodes)
