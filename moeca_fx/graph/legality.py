"""What a graph may hold after each stage; checked after every pass, so that a failure is named where it arises."""

from collections.abc import Callable

import torch
from torch import fx

from moeca_fx.errors import PassError
from moeca_fx.ops.experts import is_marker

aten = torch.ops.aten


def _no_higher_order(node: fx.Node) -> str | None:
    if "wrap_with" in str(node.target) or "_assert_tensor_metadata" in str(node.target):
        return "higher-order calls and metadata assertions must be gone"
    if node.target is aten.slice.Tensor and len(node.args) > 2 and node.args[2] is None:
        return "a slice must start at a number"
    return None


def _no_marker(node: fx.Node) -> str | None:
    if is_marker(node):
        return "experts markers must be lowered"
    return _no_higher_order(node)


def _captured(node: fx.Node) -> str | None:
    if node.op == "call_method" or (node.op == "call_module" and not str(node.target).startswith("_guards")):
        return "only functions, attributes and inputs may be captured"
    return None


_RULES: dict[str, Callable[[fx.Node], str | None]] = {
    "capture": _captured,
    "normalize": _no_higher_order,
    "locate": _no_higher_order,
    "vectorize_experts": _no_marker,
    "pack_stream": _no_marker,
    "insert_cache": _no_marker,
    "lower_linear": _no_marker,
    "pair_rotary": _no_marker,
    "lower_kernels": _no_marker,
    "lower_inplace": _no_marker,
}


def check(stage: str, module: fx.GraphModule) -> None:
    """Raise `PassError` when `module` holds a node that is illegal after `stage`."""
    rule = _RULES[stage]
    for node in module.graph.nodes:
        if (problem := rule(node)) is not None:
            raise PassError(f"after pass {stage!r}: node {node.name} ({node.target}) is illegal: {problem}")
