"""Which caches of an ONNX graph onnxruntime may write where they lie.

    cache_out.s.key = ScatterND(cache_in.s.key, place, values)

onnxruntime's CPU kernel copies the whole cache first, unless input and output are bound to the same memory. Nothing in
ONNX orders another reader of the input before the write, so a cache is written in place only where every reader is an
ancestor of the write: it must have run.
"""

from typing import Any

from moeca_fx.export.graph import CACHE_IN, CACHE_OUT

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
"""Their results may lie in the memory of what they are given, so who reads those reads the cache."""


def caches_in_place(model: Any) -> list[str]:
    """Names of the outputs, of an `onnx_ir.Model`, that may be bound to their cache's input."""
    inputs = {value.name: value for value in model.graph.inputs}
    found = []
    for output in model.graph.outputs:
        cache = inputs.get(output.name.replace(CACHE_OUT, CACHE_IN)) if output.name.startswith(CACHE_OUT) else None
        write = output.producer()
        if cache is None or write is None or write.op_type != "ScatterND" or write.inputs[0] is not cache:
            continue
        if not cache.is_graph_output() and _readers(cache) - {write} <= _ancestors(write):
            found.append(output.name)
    return found


def _readers(value: Any) -> set[Any]:
    """Nodes that read the memory of a value."""
    readers = set()
    for node in value.consumers():
        readers.add(node)
        if node.op_type in _VIEWS and node.inputs[0] is value:
            readers |= _readers(node.outputs[0])
    return readers


def _ancestors(node: Any) -> set[Any]:
    """Nodes whose results a node needs."""
    found: set[Any] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found
