"""pack_stream: keep the token stream contiguous in memory.

    x  = transpose(patches, 1, 2)      [B, T, H] with strides of [B, H, T]      x = clone(transpose(..), contiguous)
    x1 = x + gate * attn               inherits the strides                -->  x1 = x + gate * attn
    n  = layer_norm(x1)                copies; so does every gather of rows     n  = layer_norm(x1)

A patch embedding leaves tokens transposed, and every residual addition hands the strides on. One copy at the start
spares one in front of every norm and gather, and lets element-wise operations run over memory in order.
"""

from dataclasses import replace

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, example_value, finish
from moeca_fx.graph.sites import Sites

aten = torch.ops.aten


def pack_stream(module: fx.GraphModule, sites: Sites) -> Sites:
    """Copy every token stream that begins with other strides than those of [B, T, H], in place.

    Args:
        module: vectorised graph.
        sites: its sites.

    Returns:
        The sites, reading the packed streams.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    inner = {site.residual_out for site in sites.ordered}
    starts = dict.fromkeys(site.residual_in for site in sites.ordered if site.residual_in not in inner)
    packed = {name: _pack(module, nodes[name]) for name in starts if not _is_packed(nodes[name])}
    if not packed:
        return sites
    finish(module, "pack_stream")
    ordered = tuple(replace(site, residual_in=packed.get(site.residual_in, site.residual_in)) for site in sites.ordered)
    return replace(sites, ordered=ordered)


def _is_packed(stream: fx.Node) -> bool:
    value = example_value(stream)
    return not isinstance(value, torch.Tensor) or value.is_contiguous()


def _pack(module: fx.GraphModule, stream: fx.Node) -> str:
    """Insert the copy; returns its name."""
    with module.graph.inserting_after(stream):
        copy = call(module.graph, aten.clone.default, stream, name=f"{stream.name}_packed", like=stream)
    copy.kwargs = {"memory_format": torch.contiguous_format}
    copy.meta["val"] = copy.meta["val"].contiguous()
    stream.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    return copy.name
