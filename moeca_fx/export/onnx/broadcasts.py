"""Operands that onnxruntime's CPU kernels would broadcast in many short loops, in a form that takes one.

    Greater(code [M, 1, 4], 0 [])                            -->  Greater(code, 0 [1, 1, 1])
    Mul(q [M, 4, 1, 32], Transpose(Gather(table, rows)))     -->  Mul(q, Gather(table for every head, rows))

A kernel's loop ends where an operand's axis of 1 interrupts those that both have; after it come as many entries as all
later axes have, and each loop costs as much as some ten of them.
"""

import math
from typing import Any

import numpy

from moeca_fx.export.onnx.edits import put

_LOGIC = ("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or", "Where")
_ARITHMETIC = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub")
_SHORT = 64  # entries of a loop
_LARGEST = 4 * 2**20  # bytes of a table for every head
_FUSED = ("ReduceMean",)  # what comes from it is half of a norm that runtimes know by its numbers []


def lengthen_loops(model: Any) -> None:
    """Both, wherever sizes are known; `model` is an `onnx_ir.Model`."""
    tables: dict[Any, Any] = {}
    for node in list(model.graph):
        if node.op_type in (*_LOGIC, *_ARITHMETIC):
            _give_axes(model, node)
            _give_heads(model, node, tables)


def _give_axes(model: Any, node: Any) -> None:
    """Constants of one entry get as many axes as the other operand."""
    found = [_sizes(value) for value in node.inputs if value.const_value is None]
    shapes = [shape for shape in found if shape is not None]
    if not shapes or len(shapes) < len(found) or any(_producer(value) in _FUSED for value in node.inputs):
        return
    widest = max(shapes, key=len)
    if not _is_short(widest):
        return
    for place, value in enumerate(node.inputs):
        number = value.const_value
        if number is not None and number.size == 1 and len(number.shape) < len(widest):
            node.replace_input_with(place, _constant(model, node, number.numpy().reshape([1] * len(widest))))


def _is_short(shape: list[Any]) -> bool:
    """Whether an axis of 1, not the first, leaves short loops behind it."""
    units = [axis for axis, size in enumerate(shape) if axis and size == 1]
    behind = shape[units[-1] :] if units else []
    return bool(units) and all(isinstance(size, int) for size in behind) and math.prod(behind) < _SHORT


def _give_heads(model: Any, node: Any, tables: dict[Any, Any]) -> None:
    """Rows of a constant table that every head would read again: the table gets them for every head."""
    if len(node.inputs) != 2:
        return
    for place, value in enumerate(node.inputs):
        other, turn = _sizes(node.inputs[1 - place]), value.producer()
        gather = turn.inputs[0].producer() if turn is not None and turn.op_type == "Transpose" else None
        if other is None or gather is None or gather.op_type != "Gather" or gather.inputs[0].const_value is None:
            continue
        order, axis = list(turn.attributes["perm"].as_ints()), _axis(gather)
        table = gather.inputs[0].const_value.numpy()
        if order[0] != axis or not table.ndim == len(other) == len(order):  # as many as before: rows have one axis
            continue
        table = table.transpose(order)
        wanted = (table.shape[0], *other[1:])
        repeated = [a for a, (have, want) in enumerate(zip(table.shape, wanted, strict=True)) if have != want]
        fits = all(isinstance(size, int) for size in other[1:]) and all(table.shape[a] == 1 for a in repeated)
        if not fits or not repeated or math.prod(table.shape[repeated[-1] :]) >= _SHORT:
            continue
        if math.prod(wanted) * table.itemsize > _LARGEST:
            continue
        key = (gather.inputs[0], tuple(order), wanted)
        if key not in tables:
            tables[key] = _initializer(model, gather.inputs[0].name, numpy.broadcast_to(table, wanted).copy())
        node.replace_input_with(place, _gathered(model, node, tables[key], gather.inputs[1]))


def _axis(gather: Any) -> int:
    axis = int(gather.attributes["axis"].as_int()) if "axis" in gather.attributes else 0
    return axis % len(gather.inputs[0].const_value.shape)


def _sizes(value: Any) -> list[Any] | None:
    """Sizes, those that are open as names."""
    return None if value.shape is None else list(value.shape)


def _producer(value: Any) -> str | None:
    node = value.producer()
    return None if node is None else node.op_type


def _constant(model: Any, before: Any, content: Any) -> Any:
    import onnx_ir

    made = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(content)})
    put(model, before, (made,))
    return made.outputs[0]


def _initializer(model: Any, name: str, content: Any) -> Any:
    import onnx_ir

    tensor = onnx_ir.tensor(content, name=f"{name}.{'x'.join(map(str, content.shape))}")
    value = onnx_ir.Value(name=tensor.name, shape=onnx_ir.Shape(content.shape), type=onnx_ir.TensorType(tensor.dtype))
    value.const_value = tensor
    model.graph.register_initializer(value)
    return value


def _gathered(model: Any, before: Any, table: Any, rows: Any) -> Any:
    import onnx_ir

    made = onnx_ir.node("Gather", [table, rows], {"axis": 0})
    made.outputs[0].type = table.type
    put(model, before, (made,))
    return made.outputs[0]
