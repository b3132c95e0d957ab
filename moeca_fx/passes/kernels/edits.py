"""Edits and operands that the rules of `lower_kernels` share."""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call
from moeca_fx.graph.state import SCALES_WITH
from moeca_fx.kernels.families import Family
from moeca_fx.ops import storage


def as_stored(node: fx.Node, family: Family) -> fx.Node:
    """What a kernel reads in the place of a value: a cache in bfloat16 where it lies, if the kernels widen it."""
    if family.takes_stored and node.target is storage.decode_rows:
        code, scale, dtype = node.args
        if scale is None and dtype == torch.float32 and isinstance(code, fx.Node):
            return code
    return node


def replace_call(module: fx.GraphModule, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Put a call of `target` in the place of `node`, with its metadata and readers."""
    with module.graph.inserting_before(node):
        made = call(module.graph, target, *args, name=f"{node.name}_fused", like=node)
    if SCALES_WITH in node.meta:
        made.meta[SCALES_WITH] = node.meta[SCALES_WITH]
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    return made
