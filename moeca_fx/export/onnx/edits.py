"""What every change of a translated graph does: nodes are put in, under the name of the one that they stand for."""

from collections.abc import Sequence
from typing import Any


def put(model: Any, before: Any, nodes: Sequence[Any], like: Any = None) -> None:
    """Insert nodes; what torch noted of `like`, or else of `before`, such as its place, is theirs too."""
    for made in nodes:
        made.metadata_props.update((before if like is None else like).metadata_props)
        model.graph.insert_before(before, made)


def reshaped(model: Any, before: Any, value: Any, sizes: Sequence[int], kind: Any, shape: Any) -> Any:
    """A view of a value in sizes, -1 for one that is open, put in before a node: of type `kind` and shape `shape`."""
    import onnx_ir

    wanted = onnx_ir.node("Constant", [], {"value_ints": list(sizes)})
    view = onnx_ir.node("Reshape", [value, wanted.outputs[0]])
    put(model, before, (wanted, view))
    view.outputs[0].type, view.outputs[0].shape = kind, shape
    return view.outputs[0]
