"""Writes of a traced graph as operations that make a new value, read by all that come after the write.

    m = zeros_like(x)                            m = zeros_like(x)
    scatter_(m, 1, i, 1)                         n = scatter(m, 1, i, 1)
    copy_(select(m, -1, 1), row)        -->      o = select_scatter(n, row, -1, 1)
    use(m)                                       use(o)

Only where the trace shows that nothing else sees the memory.
"""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, example_value

aten = torch.ops.aten


class NoRuleError(Exception):
    """An operation that only a second trace makes functional."""


def is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether the operation is made of others, so that torch would take it apart to tell a view from a copy."""
    return target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def may_alias(target: torch._ops.OpOverload) -> bool:
    """Whether a result may share memory with an operand, by the schema."""
    schema = target._schema
    return any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))


_FRESH = (aten.linear.default, aten.matmul.default, aten.conv2d.default, aten.layer_norm.default)
"""Compositions that never return an argument."""


def out_of_place(node: fx.Node, target: torch._ops.OpOverload) -> None:
    """``x.op_(..)`` on a tensor that nothing else can see becomes ``op(x, ..)``, read by all that come after it."""
    base = node.args[0] if node.args else None
    functional = _functional_form(target)
    order = {other: position for position, other in enumerate(node.graph.nodes)}
    if target is aten.copy_.default and isinstance(base, fx.Node) and base.target is aten.select.int:
        _into_row(node, base, order)
        return
    if functional is None or not isinstance(base, fx.Node) or not _is_alone(base, node, order):
        raise NoRuleError(target)
    node.target = functional
    base.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])


def _into_row(node: fx.Node, row: fx.Node, order: dict[fx.Node, int]) -> None:
    """``x[.., 1] = source``: a write through `row` of memory that nothing else sees becomes ``select_scatter``."""
    base, source = row.args[0], node.args[1]
    assert isinstance(base, fx.Node)
    if not isinstance(source, fx.Node) or len(node.args) > 2 or not _is_fresh(base):
        raise NoRuleError(node.target)
    have, want = example_value(source), example_value(row)
    if have.shape != want.shape or have.dtype != want.dtype:
        raise NoRuleError(node.target)
    early = [user for user in base.users if order[user] < order[node]]
    for view in (user for user in early if not _is_fresh(user)):  # other views must not be read any more
        if not all(user is node or (order[user] < order[node] and _is_fresh(user)) for user in view.users):
            raise NoRuleError(node.target)
    with node.graph.inserting_before(node):
        made = call(node.graph, aten.select_scatter.default, base, source, *row.args[1:], name="written", like=base)
    base.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made and order[user] > order[node])
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _functional_form(target: torch._ops.OpOverload) -> Any:
    """The operation of the same overload that writes nothing; None unless `target` writes its first argument alone."""
    schema = target._schema
    written = [value.alias_info is not None and value.alias_info.is_write for value in schema.arguments]
    _, _, name = schema.name.partition("::")
    if not name.endswith("_") or written != [True] + [False] * (len(written) - 1):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if found is None or [a.name for a in found._schema.arguments] != [a.name for a in schema.arguments]:
        return None
    return found


def _is_alone(base: fx.Node, writer: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether `base` is memory of its own that no call before `writer` made an alias of."""
    before = [user for user in base.users if order[user] < order[writer]]
    return _is_fresh(base) and all(_is_fresh(user) for user in before)


def _is_fresh(node: fx.Node) -> bool:
    """Whether a call's result is new memory. Compositions may hand an argument back, whatever their schema says."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or may_alias(target):
        return False
    return target in _FRESH or not is_composite(target)
