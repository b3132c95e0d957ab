"""The one engine that edits graphs: insert, replace, sort, clean up. Passes only decide."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from moeca_fx.errors import PassError


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, name: str, like: fx.Node | None = None) -> fx.Node:
    """Append a call of `target` at the current insertion point.

    Args:
        name: readable base name of the new node.
        like: a node whose metadata (value, module stack) describes the result too.
    """
    node = graph.create_node("call_function", target, args, {}, name=name)
    if like is not None:
        copy_meta(like, node)
    return node


def copy_meta(source: fx.Node, target: fx.Node) -> None:
    """Give `target` the value and the module stack of `source`, for reports and later passes."""
    for key in ("val", "nn_module_stack"):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def likened(node: fx.Node, other: fx.Node) -> fx.Node:
    """Record for a node the value of the other, whose place it takes; returns the node."""
    if "val" in other.meta:
        node.meta["val"] = other.meta["val"]
    return node


def clone_nodes(
    graph: fx.Graph, nodes: Iterable[fx.Node], replace: Mapping[fx.Node, fx.Node], prefix: str
) -> dict[fx.Node, fx.Node]:
    """Copy `nodes` (given in order) at the insertion point, reading `replace` instead of its keys."""
    copies: dict[fx.Node, fx.Node] = dict(replace)
    for node in nodes:
        copy = graph.node_copy(node, lambda old: copies.get(old, old))
        copy._rename(f"{prefix}_{node.name}")
        copies[node] = copy
    return copies


def sort_stably(graph: fx.Graph) -> None:
    """Order nodes so that inputs come first, otherwise as they are; the output node stays last.

    Raises:
        PassError: a node reads what is made of itself.
    """
    seen: set[fx.Node] = set()
    ordered: list[fx.Node] = []

    def place(root: fx.Node) -> None:
        stack = {root: iter(root.all_input_nodes)}
        while stack:
            node, inputs = next(reversed(stack.items()))
            pending = next((i for i in inputs if i not in seen), None)
            if pending in stack:
                raise PassError(f"{node}: expected inputs that come before it, found {pending}, which is made of it")
            if pending is not None:
                stack[pending] = iter(pending.all_input_nodes)
                continue
            stack.popitem()
            seen.add(node)
            ordered.append(node)

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in [*placeholders, *(n for n in graph.nodes if n.op not in ("placeholder", "output"))]:
        if node not in seen:
            place(node)
    ordered.append(graph.output_node())
    anchor = ordered[0]
    graph._root.append(anchor)
    for node in ordered[1:]:
        anchor.append(node)
        anchor = node


def finish(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Sort, drop dead nodes and attributes, check and recompile.

    Raises:
        PassError: the pass `name` left an illegal graph.
    """
    sort_stably(module.graph)
    try:
        # The graph is functional, so what no output needs is dead (fx keeps attention: it may draw dropout).
        module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        module.delete_all_unused_submodules()
        drop_unused_attributes(module)
        module.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise PassError(f"pass {name!r} left an illegal graph: {error}; please report this model") from error
    module.recompile()
    return module


def drop_unused_attributes(module: fx.GraphModule) -> None:
    """Delete parameters, buffers and constants that no node reads, so that they do not stay in memory."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    tensors = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    called = tuple(f"{node.target}." for node in module.graph.nodes if node.op == "call_module")
    for name in tensors:
        if name not in read and not name.startswith(called):
            owner_path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner_path), leaf)


def evaluate(module: fx.GraphModule, node: fx.Node) -> Any:
    """The view that a chain of operations on an attribute gives."""
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    arguments = fx.map_arg((node.args, node.kwargs), lambda source: evaluate(module, source))
    return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]  # a view operation


def attribute(module: torch.nn.Module, path: str) -> Any:
    """The value of a dotted attribute path, e.g. a ``get_attr`` target."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def example_value(node: fx.Node) -> Any:
    """The fake value that capture recorded for a node; None where there is none."""
    return node.meta.get("val")


def is_on_cpu(node: fx.Node, dtype: torch.dtype | None = None) -> bool:
    """Whether the value of a node is a tensor on a CPU, of this dtype if one is given."""
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and dtype in (None, value.dtype)


def programs_of(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graphs that a graph calls: programs over rows and over experts."""
    return [child for child in module.children() if isinstance(child, fx.GraphModule)]


def module_path(node: fx.Node) -> str:
    """Path of the innermost module of the original model whose forward made this node; "" at the top."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return ""
    path = str(stack[-1][0])
    if path.startswith("_empty_nn_module_stack"):  # what torch.export writes on sizes of inputs
        return ""
    return path.removeprefix("L['self']").removeprefix(".")
