"""Name a router's form from the operations between the tokens and the chosen experts' weights; for reports only."""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.slicing import between

aten = torch.ops.aten
_SCORES = {
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
    aten.sigmoid.default: "sigmoid",
}


def describe_router(x: fx.Node, expert: fx.Node, weight: fx.Node, stream: fx.Node) -> str:
    """E.g. ``"sigmoid, bias-corrected top-2, renormalised, scaled by 2.5"``.

    Args:
        x, expert, weight: the experts' operands in the captured graph.
        stream: the token stream before the layer, which a router may read where it does not read the experts' rows.
    """
    choosing = _behind(x, expert) or between([stream], [expert])
    weighing = _behind(x, weight) or between([stream], [weight])
    parts = [name for target, name in _SCORES.items() if any(node.target is target for node in weighing)]
    parts = list(dict.fromkeys(parts)) or ["unscored"]
    top = [node for node in choosing if node.target is aten.topk.default]
    corrected = any(node.target is aten.add.Tensor and _reads_parameter(node) for node in choosing)
    grouped = "group-limited " if len(top) > 1 else ""
    size = top[-1].args[1] if top else "?"
    parts.append(f"{'bias-corrected ' if corrected else ''}{grouped}top-{size}")
    if any(node.target is aten.div.Tensor for node in weighing):
        parts.append("renormalised")
    scales = [node.args[1] for node in weighing if node.target is aten.mul.Tensor and isinstance(node.args[1], float)]
    if scales:
        parts.append(f"scaled by {scales[-1]:g}")
    return ", ".join(parts)


def _behind(x: fx.Node, node: fx.Node) -> list[fx.Node]:
    """Nodes between the last tensor that tokens and routing share, and `node`."""
    source: Any = x.args[0] if x.op == "call_function" and x.args else x
    return between([source if isinstance(source, fx.Node) else x], [node])


def _reads_parameter(node: fx.Node) -> bool:
    return any(source.op == "get_attr" for source in node.all_input_nodes)
