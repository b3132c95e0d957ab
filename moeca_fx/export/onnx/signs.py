"""Signs that a constant table can carry: rotary positions turn half of what they read by a sign.

Mul(Concat(Neg(b), a), Gather(table, rows))  -->  Mul(Concat(b, a), Gather(table with those columns negated, rows))
"""

from typing import Any

import numpy

from moeca_fx.export.onnx.edits import put

_SIGNED = "signed"


def fold_signs(model: Any) -> None:
    """Where the sizes of the parts are known; `model` is an `onnx_ir.Model`. What nothing reads any more stays."""
    tables: dict[Any, Any] = {}
    for node in list(model.graph):
        if node.op_type == "Mul":
            for place in (0, 1):
                _fold(model, node, place, tables)


def _fold(model: Any, node: Any, place: int, tables: dict[Any, Any]) -> None:
    import onnx_ir

    joined, factor = node.inputs[place].producer(), node.inputs[1 - place]
    signs = _signs(joined)
    gather = _gather_of_rows(factor)
    source = factor if gather is None else gather.inputs[0]
    if signs is None or source.const_value is None:
        return
    table = source.const_value.numpy()
    if table.ndim < 2 or table.shape[-1] != len(signs):
        return
    key = (source, tuple(signs))
    if key not in tables:
        tables[key] = _initializer(model, source, table * numpy.array(signs, dtype=table.dtype))
    unsigned = [_unsigned(value) for value in joined.inputs]
    concat = onnx_ir.node("Concat", unsigned, joined.attributes)
    put(model, node, (concat,))
    concat.outputs[0].type, concat.outputs[0].shape = joined.outputs[0].type, joined.outputs[0].shape
    node.replace_input_with(place, concat.outputs[0])
    signed = tables[key]
    if gather is not None:
        rows = onnx_ir.node("Gather", [signed, gather.inputs[1]], {"axis": 0})
        put(model, node, (rows,))
        signed = rows.outputs[0]
        signed.type, signed.shape = factor.type, factor.shape
    node.replace_input_with(1 - place, signed)


def _gather_of_rows(value: Any) -> Any:
    """What gathers a value along the first axis, if anything does."""
    node = value.producer()
    if node is None or node.op_type != "Gather":
        return None
    return node if "axis" not in node.attributes or node.attributes["axis"].as_int() == 0 else None


def _signs(joined: Any) -> list[int] | None:
    """The sign of each entry of the last axis, where some are negated."""
    if joined is None or joined.op_type != "Concat" or len(list(joined.outputs[0].consumers())) != 1:
        return None
    parts = [_unsigned(value) for value in joined.inputs]
    if all(part is value for part, value in zip(parts, joined.inputs, strict=True)):
        return None
    shapes = [None if part.shape is None else list(part.shape) for part in parts]
    axis = joined.attributes["axis"].as_int()
    if any(shape is None or not isinstance(shape[-1], int) or axis not in (-1, len(shape) - 1) for shape in shapes):
        return None
    signs: list[int] = []
    for part, value, shape in zip(parts, joined.inputs, shapes, strict=True):
        signs += [1 if part is value else -1] * shape[-1]  # type: ignore[index]  # none is None
    return signs


def _unsigned(value: Any) -> Any:
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Neg" else value


def _initializer(model: Any, source: Any, content: Any) -> Any:
    import onnx_ir

    name = f"{source.name}.{_SIGNED}"
    while name in model.graph.initializers:
        name += f".{_SIGNED}"
    tensor = onnx_ir.tensor(content, name=name)
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(content.shape), type=onnx_ir.TensorType(tensor.dtype))
    value.const_value = tensor
    model.graph.register_initializer(value)
    return value
