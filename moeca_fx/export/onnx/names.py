"""Names of ONNX nodes that say where in the model they come from: ``<module path>/<stage>/<operator>``.

torch names nodes by their operator alone. What survives its two traces is a node's stack trace, so that carries the
name: `label` writes it before the first, `name_nodes` reads it after the last.
"""

from collections import Counter
from functools import wraps
from typing import Any

from torch import fx

from moeca_fx.graph.rewrite import module_path
from moeca_fx.graph.sites import Sites

_MARK = "moeca_fx: "
_STACK_TRACE = "pkg.torch.onnx.stack_trace"
_OURS = ("provisional_", "new_", "count_", "cache_")


def label(module: fx.GraphModule, sites: Sites) -> fx.GraphModule:
    """Let every operation that a graph runs carry the name of the node that runs it; `module` is edited in place."""
    paths = sorted((site.path for site in sites.ordered), key=len, reverse=True)
    for node in module.graph.nodes:
        node.meta["stack_trace"] = _MARK + _place(node, paths)

    @wraps(module.forward)
    def run(*inputs: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*inputs)

    module.forward = run
    return module


def _place(node: fx.Node, paths: list[str]) -> str:
    """``<site>/<stage>`` of a node that a pass made, else ``<module>/<name>``."""
    name, before = node.name, ""
    for prefix in _OURS:
        if name.startswith(prefix):
            name, before = name.removeprefix(prefix), prefix
    for path in paths:
        flat = path.replace(".", "_")
        if name.startswith(f"{flat}_"):
            stage = name.removeprefix(f"{flat}_").removesuffix("_result")
            return f"{path}/{before}{stage}"
    return f"{module_path(node) or 'model'}/{node.name}"


def place_of(node: Any) -> str:
    """``<module path>/<stage>`` of a node, before `name_nodes` drops what torch noted of it."""
    found = str(node.metadata_props.get(_STACK_TRACE, ""))
    return found.removeprefix(_MARK) if found.startswith(_MARK) else "model"


def name_nodes(model: Any) -> None:
    """Name the nodes of an `onnx_ir.Model`, and drop what torch noted of them: it tells of the machine's folders."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        name = f"{place_of(node)}/{node.op_type}"
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
