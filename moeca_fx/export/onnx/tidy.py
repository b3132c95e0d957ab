"""What is done to a graph after torch translated it, in place of torch's own optimiser."""

from collections.abc import Sequence
from typing import Any


def tidy(model: Any) -> None:
    """Fold what is constant, drop what is computed twice or read by nothing."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    names = [value.name for value in model.graph.outputs]
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
    _drop_transposes_of_nothing(model)
    _axes_from_the_front(model)
    _sizes_of_splits(model)
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


def _drop_transposes_of_nothing(model: Any) -> None:
    """torch writes one before and after every indexed write; onnxruntime would copy whole caches for each."""
    from onnx_ir.convenience import replace_all_uses_with

    for node in list(model.graph):
        if node.op_type == "Transpose" and not node.outputs[0].is_graph_output():
            order = list(node.attributes["perm"].as_ints())
            if order == sorted(order):
                replace_all_uses_with(node.outputs[0], node.inputs[0])
                model.graph.remove(node)


def _axes_from_the_front(model: Any) -> None:
    """Reductions over axes counted from the back give a wrong shape in onnxruntime 1.31 where a list is empty."""
    import onnx_ir

    for node in list(model.graph):
        source = node.inputs[0] if node.op_type.startswith(("Reduce", "Arg")) else None
        if source is None or source.shape is None:
            continue
        rank = len(source.shape)
        if "axis" in node.attributes:
            axis = node.attributes["axis"].as_int()
            node.attributes["axis"] = onnx_ir.AttrInt64("axis", axis % rank)
        elif len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            axes = node.inputs[1].const_value.numpy().reshape(-1)
            if (axes < 0).any():
                value = onnx_ir.tensor(axes % rank, name=f"{node.name}_axes")
                made = onnx_ir.node("Constant", [], {"value": value})
                model.graph.insert_before(node, made)
                node.replace_input_with(1, made.outputs[0])


def _sizes_of_splits(model: Any) -> None:
    """onnxscript asks for the number of outputs even where sizes are given, which ONNX allows one of."""
    for node in model.graph:
        if node.op_type == "Split" and len(node.inputs) > 1 and node.inputs[1] is not None:
            node.attributes.pop("num_outputs", None)
