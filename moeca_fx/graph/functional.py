"""Functional form of a traced graph: operations that may alias or write become ones that do neither, node by node.

    chunk(x, 6, -1)                   split(x, 384, -1)
    flatten(x, 2); reshape(x, ..)     view(x, ..), or _unsafe_view(clone(x), ..) where no view can be taken
    to(x, dtype)                -->   x, or _to_copy(x, dtype)
    m = zeros_like(x)
    scatter_(m, 1, i, 1)              scatter(m, 1, i, 1), read by all that read m afterwards (`out_of_place`)
    linear(x, w), under autocast      linear(_to_copy(x, bf16), _to_copy(w, bf16))

torch's own way there (`ExportedProgram.run_decompositions`) traces the whole graph again, which takes twice as long as
the first trace. It is what is left for graphs with an operation that no rule here covers, and for those traced
under autocast, whose casts the first trace does not hold.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from moeca_fx.autocast import Autocast
from moeca_fx.graph.out_of_place import NoRuleError, is_composite, may_alias, out_of_place
from moeca_fx.graph.rewrite import call, example_value

aten = torch.ops.aten


def functional_module(program: ExportedProgram) -> fx.GraphModule:
    """The module of an exported program, functional: no operation writes to a tensor that another one reads.

    Args:
        program: what `torch.export.export` gives, with the fake value of every node in its metadata.
    """
    module: fx.GraphModule = program.module(check_guards=False)
    if Autocast.now().dtypes or _switches_autocast_on(module):  # only the second trace sees the casts
        return _traced_again(program)
    try:
        for part in module.modules():
            if isinstance(part, fx.GraphModule):  # the module itself and the bodies of higher-order calls
                _make_functional(part)
    except NoRuleError:
        return _traced_again(program)
    return module


def _traced_again(program: ExportedProgram) -> fx.GraphModule:
    module: fx.GraphModule = program.run_decompositions({}).module(check_guards=False)
    return module


def _switches_autocast_on(module: fx.GraphModule) -> bool:
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    return any(
        node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is not False
        for part in parts
        for node in part.graph.nodes
    )


def _make_functional(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _rewrite(node, node.target)
    module.graph.lint()
    module.recompile()


def _rewrite(node: fx.Node, target: torch._ops.OpOverload) -> None:
    """Replace one call.

    Raises:
        NoRuleError: it may write or alias, and no rule covers it.
    """
    if target is aten.detach_.default:  # of a constant that is lifted out of the model's code; it writes nothing
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a node, by the schema
        node.graph.erase_node(node)
    elif target._schema.is_mutable:
        out_of_place(node, target)
    elif (rule := _RULES.get(target)) is not None:
        with node.graph.inserting_before(node):
            made = rule(node)
        node.replace_all_uses_with(made)
        node.graph.erase_node(node)
    elif is_composite(target) and may_alias(target):
        raise NoRuleError(target)


# -- views --------------------------------------------------------------------------------------------------------


def _view(node: fx.Node) -> fx.Node:
    """A view of the same elements in the result's shape; a copy of them where strides allow none."""
    x, result = node.args[0], example_value(node)
    assert isinstance(x, fx.Node)
    sizes = [size if isinstance(size, int) else -1 for size in result.shape]
    if sizes.count(-1) > 1:
        raise NoRuleError(node.target)
    if _has_view(example_value(x), list(result.shape)):
        return call(node.graph, aten.view.default, x, sizes, name="view", like=node)
    packed = call(node.graph, aten.clone.default, x, name="contiguous", like=x)
    packed.kwargs = {"memory_format": torch.contiguous_format}
    return call(node.graph, aten._unsafe_view.default, packed, sizes, name="view", like=node)


def _has_view(value: Tensor, shape: list[Any]) -> bool:
    try:
        value.view(shape)
    except (RuntimeError, ValueError):
        return False
    return True


def _chunk(node: fx.Node) -> fx.Node:
    x, count, *rest = node.args
    assert isinstance(x, fx.Node) and isinstance(count, int)
    dim = rest[0] if rest else node.kwargs.get("dim", 0)
    length = example_value(x).shape[dim]
    if not isinstance(length, int):
        raise NoRuleError(node.target)
    return call(node.graph, aten.split.Tensor, x, -(-length // count), dim, name="split", like=node)


def _expand(node: fx.Node) -> fx.Node:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    given, wanted = example_value(x).shape, example_value(node).shape
    kept = [-1] * (len(wanted) - len(given))  # dimensions in front have no size to keep
    aligned = [*kept, *given]
    sizes = [-1 if same is not None and same == size else size for same, size in zip(aligned, wanted, strict=True)]
    if not all(isinstance(size, int) for size in sizes) or any(size == -1 for size in sizes[: len(kept)]):
        raise NoRuleError(node.target)
    return call(node.graph, aten.expand.default, x, sizes, name="expand", like=node)


# -- copies that may be none --------------------------------------------------------------------------------------


def _cast(node: fx.Node) -> fx.Node:
    x, result = node.args[0], example_value(node)
    assert isinstance(x, fx.Node)
    value = example_value(x)
    if _asks_for_more(node):
        raise NoRuleError(node.target)
    moved = {} if value.device == result.device else {"device": result.device}
    if value.dtype == result.dtype and not moved:
        return x
    cast = call(node.graph, aten._to_copy.default, x, name="to", like=node)
    cast.kwargs = {"dtype": result.dtype, **moved}
    return cast


def _asks_for_more(node: fx.Node) -> bool:
    """Whether a cast names anything but a dtype: a layout, a copy."""
    plain = {"dtype", "non_blocking", "layout", "device", "pin_memory"}
    further = node.args[3:] if node.target is aten.to.dtype else node.args[1:]
    return any(value not in (None, False) for value in further) or any(
        key not in plain and value not in (None, False) for key, value in node.kwargs.items()
    )


def _contiguous(node: fx.Node) -> fx.Node:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    layout = node.kwargs.get("memory_format", torch.contiguous_format)
    if layout is not torch.contiguous_format or len(node.args) > 1:
        raise NoRuleError(node.target)
    if example_value(x).is_contiguous():
        return x
    packed = call(node.graph, aten.clone.default, x, name="contiguous", like=node)
    packed.kwargs = {"memory_format": torch.contiguous_format}
    return packed


_RULES: dict[Any, Callable[[fx.Node], fx.Node]] = {
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.view_as.default: _view,
    aten.chunk.default: _chunk,
    aten.expand_as.default: _expand,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.contiguous.default: _contiguous,
}
