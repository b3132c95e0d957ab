"""Transposes that move nothing but axes of 1: onnxruntime copies for each, and a view does.

Transpose(x [M, 4, 1, 32], (0, 2, 1, 3))                           -->  Reshape(x, [-1, 1, 4, 32])
Slice(Transpose(x [M, 1, 3, 4, 32], (2, 0, 3, 1, 4)), 1, 2, 0)     -->  Reshape(Slice(x, 1, 2, 2), [1, -1, 4, 1, 32])
"""

from typing import Any

from moeca_fx.export.onnx.edits import put, reshaped


def drop_transposes(model: Any) -> None:
    """Where sizes are known; `model` is an `onnx_ir.Model`."""
    for node in list(model.graph):
        if node.op_type == "Transpose":
            _slice_first(model, node)
    for node in list(model.graph):
        if node.op_type == "Transpose" and not node.outputs[0].is_graph_output():
            _drop(model, node)


def _order(node: Any) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _moves_nothing(order: list[int], shape: list[Any]) -> bool:
    """Whether what has more than one entry stays in order."""
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)


def _drop(model: Any, node: Any) -> None:
    from onnx_ir.convenience import replace_all_uses_with

    order, given = _order(node), node.inputs[0]
    if order == sorted(order):  # torch writes one before and after every indexed write of a cache
        replace_all_uses_with(node.outputs[0], given)
        model.graph.remove(node, safe=True)
        return
    sizes = [] if given.shape is None else [size if isinstance(size, int) else -1 for size in given.shape]
    if not sizes or sizes.count(-1) > 1 or 0 in sizes or not _moves_nothing(order, sizes):
        return
    made = node.outputs[0]
    view = reshaped(model, node, given, [sizes[axis] for axis in order], made.type, made.shape)
    replace_all_uses_with(made, view)
    model.graph.remove(node, safe=True)


def _slice_first(model: Any, node: Any) -> None:
    """Let every reader of a transpose slice its input instead, where nothing is left to be moved then."""
    import onnx_ir
    from onnx_ir.convenience import replace_all_uses_with

    given, order, readers = node.inputs[0], _order(node), list(node.outputs[0].consumers())
    picks = [_picked(reader, node.outputs[0]) for reader in readers]
    if given.shape is None or not picks or None in picks or node.outputs[0].is_graph_output():
        return
    shapes = []
    for pick in picks:
        shape = list(given.shape)
        shape[order[pick]] = 1  # type: ignore[index]  # none is None
        shapes.append(shape)
    if not all(_moves_nothing(order, shape) for shape in shapes):
        return
    for reader, pick, shape in zip(readers, picks, shapes, strict=True):
        axis = onnx_ir.node("Constant", [], {"value_ints": [order[pick]]})  # type: ignore[index]  # as above
        axis.outputs[0].const_value = onnx_ir.tensor([order[pick]])  # type: ignore[index]  # as above
        part = onnx_ir.node("Slice", [given, *reader.inputs[1:3], axis.outputs[0]])
        turned = onnx_ir.node("Transpose", [part.outputs[0]], {"perm": order})
        put(model, reader, [axis, part, turned])
        part.outputs[0].type, part.outputs[0].shape = given.type, onnx_ir.Shape(shape)
        _same(turned.outputs[0], reader.outputs[0])
        replace_all_uses_with(reader.outputs[0], turned.outputs[0])
        model.graph.remove(reader, safe=True)
    model.graph.remove(node, safe=True)


def _picked(reader: Any, of: Any) -> int | None:
    picked = picked_entry(reader, of)
    return None if picked is None else picked[0]


def picked_entry(reader: Any, of: Any) -> tuple[int, int] | None:
    """The axis of which a node picks one entry, and which, by numbers that are known."""
    if reader.op_type != "Slice" or reader.inputs[0] is not of or reader.outputs[0].is_graph_output():
        return None
    numbers = [None if value is None or value.const_value is None else value.const_value for value in reader.inputs[1:]]
    if len(numbers) not in (3, 4) or any(number is None or number.size != 1 for number in numbers):
        return None
    start, end, axis, *step = (int(number.numpy().item()) for number in numbers if number is not None)
    return (axis, start) if axis >= 0 and start >= 0 and end == start + 1 and step in ([], [1]) else None


def _same(value: Any, old: Any) -> None:
    value.type, value.shape = old.type, old.shape
