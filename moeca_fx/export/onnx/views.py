"""Views of views: one node is enough, or none.

Squeeze(Reshape(x [M, 4, 1, 32], [-1, 1, 4, 32]), 1)  -->  Reshape(x, [-1, 4, 32])
Squeeze(Unsqueeze(x [M, 128], 1), 1)                  -->  x
Unsqueeze(each of Split(x [B, 768], 6), 1)            -->  Split(Unsqueeze(x, 1), 6)
"""

from collections.abc import Sequence
from typing import Any

from moeca_fx.export.onnx.edits import put, reshaped

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def merge_views(model: Any) -> None:
    """Where at most one size is open, or the sizes are those of before; `model` is an `onnx_ir.Model`.

    What nothing reads any more stays.
    """
    for node in list(model.graph):
        if node.op_type == "Split":
            _unsqueeze_first(model, node)
    for node in list(model.graph):
        if node.op_type in _VIEWS and node.inputs[0] is not None and not node.outputs[0].is_graph_output():
            _merge(model, node)


def _merge(model: Any, node: Any) -> None:
    """Let a view be one of what its input is a view of."""
    from onnx_ir.convenience import replace_all_uses_with

    inner = node.inputs[0].producer()
    root = inner.inputs[0] if inner is not None and inner.op_type in _VIEWS else node.inputs[0]
    made, sizes = node.outputs[0], _sizes(node)
    if sizes is not None and _is_of_sizes(root, sizes, made):
        replace_all_uses_with(made, root)
        return
    if sizes is None or root is node.inputs[0] or sizes.count(-1) > 1 or 0 in sizes:
        return
    replace_all_uses_with(made, reshaped(model, node, root, sizes, made.type, made.shape))


def _sizes(view: Any) -> list[int] | None:
    """Sizes of a view, -1 where they are open; torch's translations know none of what lies within them."""
    if view.outputs[0].shape is not None:
        return _closed(view.outputs[0].shape)
    wanted = view.inputs[1].const_value if view.op_type == "Reshape" else None
    return None if wanted is None else [int(size) for size in wanted.numpy().reshape(-1)]


def _closed(shape: Sequence[Any]) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in shape]


def _is_of_sizes(root: Any, sizes: list[int], made: Any) -> bool:
    """Whether a value is already of the sizes of a view of it."""
    if root.shape is None:
        return False
    if made.shape is not None and list(root.shape) == list(made.shape):
        return True
    return _closed(root.shape) == sizes and sizes.count(-1) <= 1 and 0 not in sizes


def _unsqueeze_first(model: Any, node: Any) -> None:
    """Where every part of a split matrix is given the same axis: one view for all."""
    import onnx_ir
    from onnx_ir.convenience import replace_all_uses_with

    given, axis = node.inputs[0], node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    readers = [reader for part in node.outputs for reader in part.consumers()]
    if given.shape is None or len(given.shape) != 2 or axis % 2 != 1 or len(readers) < 2:
        return
    if any(_axis_given(reader) != 1 or reader.outputs[0].is_graph_output() for reader in readers):
        return
    view = onnx_ir.node("Unsqueeze", [given, readers[0].inputs[1]])
    attributes = {name: value for name, value in node.attributes.items() if name != "axis"}
    split = onnx_ir.node(
        "Split", [view.outputs[0], *node.inputs[1:]], {**attributes, "axis": 2}, num_outputs=len(node.outputs)
    )
    put(model, node, (view, split))
    batch, width = given.shape
    view.outputs[0].type, view.outputs[0].shape = given.type, onnx_ir.Shape([batch, 1, width])
    for part, made in zip(node.outputs, split.outputs, strict=True):
        for reader in list(part.consumers()):
            made.type, made.shape = reader.outputs[0].type, reader.outputs[0].shape
            replace_all_uses_with(reader.outputs[0], made)


def _axis_given(reader: Any) -> int | None:
    """The one axis that a node puts in."""
    axes = reader.inputs[1].const_value if reader.op_type == "Unsqueeze" else None
    return int(axes.numpy().item()) if axes is not None and axes.size == 1 else None
