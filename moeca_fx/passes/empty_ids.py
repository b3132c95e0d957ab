"""Whether a router may leave slots without an expert: whether anything replaces ids after they were chosen.

    scores, ids = topk(scores, k)                      in range whatever the input: no slot is empty
    ids         = where(scores < floor, E, ids)        may be out of range at inputs that nobody has seen yet

A probe run shows only its own input, so what a graph could do counts too. It costs only where it is so.
"""

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


def may_be_empty(expert: fx.Node) -> bool:
    """Follow ids back to what chose them.

    Args:
        expert: the experts' operand with the ids, in the captured graph.
    """
    seen: set[fx.Node] = set()
    stack = [expert]
    while stack:
        node = stack.pop()
        value = example_value(node)
        if node in seen or not isinstance(value, torch.Tensor) or value.dtype not in (torch.int64, torch.int32):
            continue
        if node.target in _REPLACES:
            return True
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return False
