"""Lengths of lists as an input of the graph: `lengths="input"`, for runtimes that would wait for each of them.

    index = Range(0, Min(Max(count, 2), most), 1)
-->
    index = Range(0, Min(Max(lengths[3], 2), most), 1)      needed[3] = count

The lists are those of `bounded_lists`. A list that is given more than it needs fills up, and every write leaves out
what only fills up; one that is given less has left something out, and the step has to run again: see `export.lengths`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moeca_fx.export.lengths import LENGTHS, NEEDED, GivenList
from moeca_fx.export.onnx.bounded_lists import BOUNDED_LISTS, LIST, plan_padded
from moeca_fx.export.onnx.edits import put
from moeca_fx.export.onnx.names import place_of
from moeca_fx.export.onnx.values import INT64, Value, as_dtype, numbers, op, places, tokens_of
from moeca_fx.ops import bounded

META = "lists"
"""Under this an `onnx_ir.Model` has its `GivenList`s in memory, in the order of the input."""


def _write_rows(cache: Value, row: Value, values: Value, valid: Value) -> Value:
    place = places(row, tokens_of(cache))
    apply = op.Unsqueeze(valid, numbers(*range(1, len(cache.shape) - 1))) if len(cache.shape) > 2 else valid
    return op.ScatterND(cache, place, op.Where(apply, as_dtype(values, cache.dtype), op.GatherND(cache, place)))


def _plan_padded(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, Value, Value]:
    return plan_padded(code, slot_expert, num_experts, may_overflow=True)


GIVEN_LISTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **BOUNDED_LISTS,
    bounded.write_rows: _write_rows,
    bounded.plan_padded: _plan_padded,
}


def lengths_as_input(model: Any, tokens: Mapping[str, int]) -> None:
    """Let an `onnx_ir.Model` take the lengths of its lists and give what they needed; one without lists stays.

    Args:
        tokens: T by a site's path; what belongs to none has the largest.
    """
    import onnx_ir

    most = max(tokens.values(), default=0)
    lists: list[GivenList] = []
    needed: list[Any] = []
    lengths = _int64(LENGTHS)
    for node in list(model.graph):
        if LIST not in node.meta:
            continue
        at_least = node.inputs[1].producer().inputs[0].producer()  # Max(count, 2) of Min(.., most)
        count = at_least.inputs[0]
        if count.producer() is not None and count.producer().inputs[0] is lengths:
            continue  # another list of the same length
        place, flat = _constant(len(lists)), _constant([1])
        length = onnx_ir.node("Gather", [lengths, place.outputs[0]])
        row = onnx_ir.node("Reshape", [count, flat.outputs[0]])
        put(model, at_least, (place, length, flat, row), like=node)
        at_least.replace_input_with(0, length.outputs[0])
        path = place_of(node).rpartition("/")[0]
        lists.append(GivenList(place_of(node), tokens=tokens.get(path, most), **node.meta[LIST]))
        needed.append(row.outputs[0])
    if lists:
        lengths.shape = onnx_ir.Shape([len(lists)])
        model.graph.inputs.append(lengths)
        joined = onnx_ir.node("Concat", needed, {"axis": 0}, outputs=[_int64(NEEDED, len(lists))])
        model.graph.append(joined)
        model.graph.outputs.append(joined.outputs[0])
    model.meta[META] = lists


def _constant(value: int | list[int]) -> Any:
    import onnx_ir

    return onnx_ir.node("Constant", [], {"value_int" if isinstance(value, int) else "value_ints": value})


def _int64(name: str, size: int | None = None) -> Any:
    import onnx_ir

    return onnx_ir.Value(
        name=name, type=onnx_ir.TensorType(INT64), shape=None if size is None else onnx_ir.Shape([size])
    )
