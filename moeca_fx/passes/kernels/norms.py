"""adaLN: gated residual, layer norm, scale and shift of every token, in one pass over memory.

    stream = x + gate * y
    n      = layer_norm(stream) * factor + shift   -->   stream, n = moeca_cpu.gated_norm(x, gate, y, factor, shift)

Without the residual it is ``moeca_cpu.modulated_norm``. Generated code takes four passes for the same.
"""

import operator
from typing import Any, TypeGuard

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, example_value
from moeca_fx.graph.slicing import addends, ancestors
from moeca_fx.kernels.families import Family
from moeca_fx.passes.kernels.edits import as_stored, replace_call

aten = torch.ops.aten


def lower_norm(module: fx.GraphModule, norm: fx.Node, family: Family) -> str | None:
    """Lower one layer norm of [B, T, H] tokens with what modulates it."""
    stream, shape, *rest = norm.args
    weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
    if weight is not None or bias is not None:
        return "the norm has weights of its own"
    if not isinstance(stream, fx.Node) or len(_shape(stream)) != 3 or len(shape) != 1:  # type: ignore[arg-type]
        return "it is not a norm of tokens [B, T, H]"
    if example_value(stream).dtype not in family.dtypes:
        return "the tokens are not fp32 or bf16"
    scaled = _only_user(norm, aten.mul.Tensor)
    shifted = _only_user(scaled, aten.add.Tensor)
    if scaled is None or shifted is None or shifted.kwargs:
        return "scale and shift do not follow it"
    factor, shift = _other(scaled, norm), _other(shifted, scaled)
    if not _per_sample(factor, stream) or not _per_sample(shift, stream):
        return "scale and shift are not one a sample"
    residual = _gated_residual(stream)
    if residual is None or stream in ancestors([factor, shift]):
        replace_call(module, shifted, family.op("modulated_norm"), stream, factor, shift, eps)
        return None
    x, gate, y = residual
    with module.graph.inserting_before(shifted):
        target = family.op("gated_norm")
        operands = (x, gate, as_stored(y, family), factor, shift, eps)
        both = call(module.graph, target, *operands, name=f"{shifted.name}_fused")
        new = [
            call(module.graph, operator.getitem, both, i, name=f"{n.name}_fused", like=n)
            for i, n in enumerate((stream, shifted))
        ]
    for old, made in zip((stream, shifted), new, strict=True):
        old.replace_all_uses_with(made)
    return None


def _gated_residual(stream: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, gate, y) of ``x + gate * y`` with one gate a sample."""
    operands = addends(stream)
    for x, product in (operands, operands[::-1]) if operands is not None else ():
        if product.target is aten.mul.Tensor and len(product.users) == 1 and _shape(x) == _shape(stream):
            left, right = product.args
            for gate, y in ((left, right), (right, left)):
                if isinstance(gate, fx.Node) and _per_sample(gate, stream) and _alike(y, stream) and _alike(x, stream):
                    return x, gate, y
    return None


def _alike(node: Any, stream: fx.Node) -> TypeGuard[fx.Node]:
    """Whether a node has the shape and dtype of the tokens."""
    if not isinstance(node, fx.Node) or _shape(node) != _shape(stream):
        return False
    return bool(example_value(node).dtype == example_value(stream).dtype)


def _only_user(node: fx.Node | None, target: Any) -> fx.Node | None:
    users = list(node.users) if node is not None else []
    return users[0] if len(users) == 1 and users[0].target is target else None


def _other(user: fx.Node, operand: fx.Node) -> Any:
    left, right = user.args
    return right if left is operand else left


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = example_value(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _per_sample(node: Any, stream: fx.Node) -> bool:
    """Whether a node is [B, 1, H] for tokens [B, T, H], in their dtype."""
    if not isinstance(node, fx.Node):
        return False
    shape, tokens = _shape(node), _shape(stream)
    same_type = len(shape) == 3 and example_value(node).dtype == example_value(stream).dtype
    return same_type and shape[1] == 1 and shape[2] == tokens[2] and tokens[1] != 1 and shape[0] == tokens[0]
