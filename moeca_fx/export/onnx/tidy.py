"""What is done to a graph after torch translated it, in place of torch's own optimiser."""

from collections.abc import Sequence
from typing import Any

import torch

from moeca_fx.errors import ExportError
from moeca_fx.export.onnx.broadcasts import lengthen_loops
from moeca_fx.export.onnx.edits import put
from moeca_fx.export.onnx.matrices import rows_as_matrices, slice_matrices
from moeca_fx.export.onnx.signs import fold_signs
from moeca_fx.export.onnx.transposes import drop_transposes
from moeca_fx.export.onnx.views import merge_views

_ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Div",
        "Equal",
        "Exp",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Reciprocal",
        "Sigmoid",
        "Softmax",
        "Sqrt",
        "Sub",
        "Where",
    ]
)


def tidy(model: Any, exact: bool = True) -> None:
    """Fold what is constant, drop what is computed twice or read by nothing.

    Args:
        exact: lists may be empty (`lengths="nonzero"`).

    Raises:
        ExportError: the rank of what is reduced, and may be empty, is not known.
    """
    import onnxscript.optimizer
    from onnx_ir.passes import common

    names = [value.name for value in model.graph.outputs]
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
    common.RemoveUnusedNodesPass()(model)  # readers that nothing reads would count
    lengthen_loops(model)
    fold_signs(model)
    drop_transposes(model)
    _weights_of_their_own(model)
    if exact:
        _axes_from_the_front(model)
    _sizes_of_splits(model)
    _gather_into_outputs(model)
    rows_as_matrices(model)
    merge_views(model)
    slice_matrices(model)
    merge_views(model)
    for part in (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        part(model)
    _name_outputs(model, names)


def _name_outputs(model: Any, names: Sequence[str]) -> None:
    """Outputs that are computed alike have become one value: each is its own again."""
    import onnx_ir

    for index, name in enumerate(names):
        value = model.graph.outputs[index]
        if value.name != name:
            node = onnx_ir.node("Identity", [value])
            node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, value.dtype, value.shape
            model.graph.append(node)
            model.graph.outputs[index] = node.outputs[0]


def _weights_of_their_own(model: Any) -> None:
    """``Gather(weights, 3)``: the weights of one expert become an initializer.

    Runtimes would copy each out of the stacked weights when they load the graph. In the file they lie where they lay.
    """
    import onnx_ir
    from onnx_ir.convenience import replace_all_uses_with
    from onnx_ir.tensor_adapters import TorchTensor

    graph = model.graph
    for node in [node for node in graph if node.op_type == "Gather" and not _axis(node)]:
        stacked, index = (value.const_value for value in node.inputs)
        raw = getattr(stacked, "raw", None)
        if not node.inputs[0].is_initializer() or not isinstance(raw, torch.Tensor) or index is None or index.shape:
            continue
        number = int(index.numpy())
        name = f"{node.inputs[0].name}.{number}"
        if name not in graph.initializers:
            tensor = TorchTensor(raw[number], name=name)
            own = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))
            own.const_value = tensor
            graph.register_initializer(own)
        replace_all_uses_with(node.outputs[0], graph.initializers[name])
        graph.remove(node, safe=True)


def _axes_from_the_front(model: Any) -> None:
    """Reductions over axes counted from the back give a wrong shape in onnxruntime 1.31 where a list is empty."""
    import onnx_ir

    for node in list(model.graph):
        if not node.op_type.startswith(("Reduce", "Arg")):
            continue
        if "axis" in node.attributes:
            (axis,) = _from_the_front(node, [node.attributes["axis"].as_int()])
            node.attributes["axis"] = onnx_ir.AttrInt64("axis", axis)
        elif len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            axes = node.inputs[1].const_value.numpy().reshape(-1).tolist()
            front = _from_the_front(node, axes)
            if front != axes:
                made = onnx_ir.node("Constant", [], {"value_ints": front})
                model.graph.insert_before(node, made)
                node.replace_input_with(1, made.outputs[0])


def _from_the_front(node: Any, axes: Sequence[int]) -> list[int]:
    if all(axis >= 0 for axis in axes):
        return list(axes)
    rank = _rank(node.inputs[0])
    if rank is None:
        raise ExportError(
            f"export to ONNX: {node.name} ({node.op_type}) reduces axes {list(axes)} of a value of unknown rank, which "
            "lists of exact length need; export it with lengths='range' (--lengths range)"
        )
    return [axis % rank for axis in axes]


def _rank(value: Any) -> int | None:
    """Rank of a value; torch's translations give none to what lies between their first and last node."""
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    if node is None:
        return None
    if node.op_type in ("Unsqueeze", "Squeeze"):
        inner, axes = _rank(node.inputs[0]), node.inputs[1].const_value if len(node.inputs) > 1 else None
        if inner is None or axes is None:
            return None
        return inner + int(axes.size) if node.op_type == "Unsqueeze" else inner - int(axes.size)
    if node.op_type not in _ELEMENTWISE:
        return None
    ranks = [_rank(source) for source in node.inputs if source is not None]
    return None if None in ranks else max(rank for rank in ranks if rank is not None)


def _sizes_of_splits(model: Any) -> None:
    """onnxscript asks for the number of outputs even where sizes are given, which ONNX allows one of."""
    for node in model.graph:
        if node.op_type == "Split" and len(node.inputs) > 1 and node.inputs[1] is not None:
            node.attributes.pop("num_outputs", None)


def _gather_into_outputs(model: Any) -> None:
    """``cache_out = Reshape(Gather(x, index))`` copies a cache once more than a gather into its own shape.

    Whoever reads the rows reads that reshaped, which is a view.
    """
    for output in list(model.graph.outputs):
        view = output.producer()
        rows: Any = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
        gather = None if rows is None else rows.producer()
        if rows is None or gather is None or gather.op_type != "Gather" or rows.is_graph_output():
            continue
        rest = list(rows.shape or ())[1:]
        leading = list(output.shape)[: len(output.shape) - len(rest)]
        source = gather.inputs[0].shape
        flat = (
            source is not None and len(source) == len(rows.shape or ()) and not _axis(gather)
        )  # the index has one axis
        if rest and flat and list(output.shape)[len(leading) :] == rest and _are_numbers([*leading[1:], *rest]):
            _gather_into(model, output, gather, [-1, *leading[1:]], [-1, *rest])


def _axis(node: Any) -> int:
    return int(node.attributes["axis"].as_int()) if "axis" in node.attributes else 0


def _are_numbers(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _gather_into(model: Any, output: Any, gather: Any, leading: list[int], flat: list[int]) -> None:
    """Gather in the shape of an output; what was read flat is that output as a view."""
    import onnx_ir
    from onnx_ir.convenience import replace_all_uses_with

    rows = gather.outputs[0]
    shapes = [onnx_ir.node("Constant", [], {"value_ints": sizes}) for sizes in (leading, flat)]
    index = onnx_ir.node("Reshape", [gather.inputs[1], shapes[0].outputs[0]])
    made = onnx_ir.node("Gather", [gather.inputs[0], index.outputs[0]])
    again = onnx_ir.node("Reshape", [made.outputs[0], shapes[1].outputs[0]])
    put(model, gather, (*shapes, index, made, again))
    for new, old in ((made.outputs[0], output), (again.outputs[0], rows)):
        new.dtype, new.shape = old.dtype, old.shape
    made.outputs[0].name, output.name = output.name, None
    replace_all_uses_with(output, made.outputs[0], replace_graph_outputs=True)
    replace_all_uses_with(rows, again.outputs[0])
