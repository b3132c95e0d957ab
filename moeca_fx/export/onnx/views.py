"""Views of views: one node is enough, or none.

Squeeze(Reshape(x [M, 4, 1, 32], [-1, 1, 4, 32]), 1)  -->  Reshape(x, [-1, 4, 32])
Squeeze(Unsqueeze(x [M, 128], 1), 1)                  -->  x
"""

from typing import Any

from moeca_fx.export.onnx.edits import put

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def merge_views(model: Any) -> None:
    """Where at most one size is open, or the sizes are those of before; `model` is an `onnx_ir.Model`.

    What nothing reads any more stays.
    """
    import onnx_ir
    from onnx_ir.convenience import replace_all_uses_with

    for node in list(model.graph):
        inner = node.inputs[0].producer() if node.op_type in _VIEWS and node.inputs[0] is not None else None
        if inner is None or inner.op_type not in _VIEWS or node.outputs[0].is_graph_output():
            continue
        root, made = inner.inputs[0], node.outputs[0]
        if made.shape is None:
            continue
        if root.shape is not None and list(root.shape) == list(made.shape):
            replace_all_uses_with(made, root)
            continue
        sizes = [size if isinstance(size, int) else -1 for size in made.shape]
        if sizes.count(-1) > 1 or 0 in sizes:
            continue
        wanted = onnx_ir.node("Constant", [], {"value_ints": sizes})
        view = onnx_ir.node("Reshape", [root, wanted.outputs[0]])
        put(model, node, (wanted, view))
        view.outputs[0].type, view.outputs[0].shape = made.type, made.shape
        replace_all_uses_with(made, view.outputs[0])
