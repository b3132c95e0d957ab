"""Rows [M, 1, K] as the matrices that they are, so that a linear is one node with its bias.

    Add(MatMul(x [M, 1, K], W), b)                     -->  Reshape(Gemm(Reshape(x, [-1, K]), W, b), [-1, 1, N])
    Mul(Reshape(x, [-1, 1, N]), Reshape(y, [-1, 1, N]))  -->  Reshape(Mul(x, y), [-1, 1, N])

    Slice(Reshape(x [M, 3 * N], [-1, 1, 3, N]), 1, 2, 2)  -->  Reshape(Slice(x, N, 2 * N, 1), [-1, 1, 1, N])

What is computed entry by entry needs no view before it; the views that are left merge with others (`views`).
"""

import math
from collections.abc import Sequence
from typing import Any

from moeca_fx.export.onnx.edits import put, reshaped
from moeca_fx.export.onnx.transposes import picked_entry

_ENTRY_BY_ENTRY = ("Add", "Div", "Erf", "Gelu", "Mul", "Neg", "Relu", "Sigmoid", "Sub", "Tanh")


def rows_as_matrices(model: Any) -> None:
    """Linears, and what follows them entry by entry, wherever sizes are known; `model` is an `onnx_ir.Model`."""
    for node in list(model.graph):
        if node.op_type == "Add":
            _add_in_product(model, node)
    for node in list(model.graph):
        if node.op_type in _ENTRY_BY_ENTRY:
            _view_afterwards(model, node)


def slice_matrices(model: Any) -> None:
    """Slice matrices themselves, not views of them, wherever sizes are known."""
    for node in list(model.graph):
        if node.op_type == "Slice" and not node.outputs[0].is_graph_output():
            _slice_matrix(model, node)


def _add_in_product(model: Any, node: Any) -> None:
    import onnx_ir

    product, bias = node.inputs[0].producer(), node.inputs[1]
    if product is None or product.op_type != "MatMul" or len(list(product.outputs[0].consumers())) != 1:
        return
    x, weight = product.inputs
    made = node.outputs[0]
    if any(value.shape is None for value in (x, weight, bias)):
        return
    if made.is_graph_output() or product.outputs[0].is_graph_output():
        return
    of_x, of_weight, of_bias = (list(value.shape) for value in (x, weight, bias))
    if len(of_x) != 3 or of_x[1] != 1 or len(of_weight) != 2 or of_bias != of_weight[1:]:
        return
    if not all(isinstance(size, int) for size in of_weight):
        return
    rows = onnx_ir.Shape([of_x[0], of_weight[0]]), onnx_ir.Shape([of_x[0], of_weight[1]])
    flat = reshaped(model, node, x, [-1, of_weight[0]], x.type, rows[0])
    gemm = onnx_ir.node("Gemm", [flat, weight, bias])
    put(model, node, (gemm,))
    gemm.outputs[0].type, gemm.outputs[0].shape = x.type, rows[1]
    _stand_for(made, reshaped(model, node, gemm.outputs[0], [-1, 1, of_weight[1]], x.type, made.shape))


def _view_afterwards(model: Any, node: Any) -> None:
    """Where all that a node reads are views of values of the same sizes."""
    import onnx_ir

    views, made = [value.producer() for value in node.inputs], node.outputs[0]
    if any(view is None or view.op_type != "Reshape" for view in views) or made.is_graph_output():
        return
    roots = [view.inputs[0] for view in views]
    if not _of_one_shape(roots) or not _of_one_shape(node.inputs):
        return
    first = onnx_ir.node(node.op_type, roots, node.attributes)
    put(model, node, (first,))
    first.outputs[0].type, first.outputs[0].shape = roots[0].type, roots[0].shape
    view = onnx_ir.node("Reshape", [first.outputs[0], views[0].inputs[1]])
    put(model, node, (view,))
    view.outputs[0].type, view.outputs[0].shape = node.inputs[0].type, node.inputs[0].shape
    _stand_for(made, view.outputs[0])


def _slice_matrix(model: Any, node: Any) -> None:
    """A slice of a matrix [M, N] seen as [M, 1, n, ..], of which it picks one of n: of N / n columns."""
    import onnx_ir

    picked, view = picked_entry(node, node.inputs[0]), node.inputs[0].producer()
    if picked is None or view is None or view.op_type != "Reshape" or node.outputs[0].shape is None:
        return
    axis, start = picked
    root, seen = view.inputs[0], node.inputs[0].shape
    if root.shape is None or len(root.shape) != 2 or seen is None or not axis:
        return
    sizes = list(seen)[1:]
    if not all(isinstance(size, int) for size in sizes) or math.prod(sizes) != root.shape[1]:
        return
    if any(size != 1 for size in sizes[: axis - 1]):
        return
    width = math.prod(sizes[axis:])
    numbers = [onnx_ir.node("Constant", [], {"value_ints": [n]}) for n in (start * width, (start + 1) * width, 1)]
    part = onnx_ir.node("Slice", [root, *(number.outputs[0] for number in numbers)])
    put(model, node, (*numbers, part))
    part.outputs[0].type, part.outputs[0].shape = root.type, onnx_ir.Shape([root.shape[0], width])
    made = node.outputs[0]
    rest = [-1, *(size for size in list(made.shape)[1:])]
    _stand_for(made, reshaped(model, node, part.outputs[0], rest, root.type, made.shape))


def _of_one_shape(values: Sequence[Any]) -> bool:
    """Whether all are known to be of the same sizes; an open size is known by its name."""
    shapes = [None if value.shape is None else list(value.shape) for value in values]
    first = shapes[0]
    return (
        first is not None
        and all(shape == first for shape in shapes)
        and all(isinstance(size, int) or size.value is not None for size in first)
    )


def _stand_for(old: Any, new: Any) -> None:
    from onnx_ir.convenience import replace_all_uses_with

    replace_all_uses_with(old, new)
