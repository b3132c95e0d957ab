"""Attention: of all tokens, where the own kernel is the faster one, and of the rows that were picked."""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.kernels.families import Family
from moeca_fx.ops.cpu_attention import own_attention_up_to
from moeca_fx.passes.kernels.edits import as_stored, replace_call


def lower_attention(module: fx.GraphModule, node: fx.Node, family: Family) -> str | None:
    """Attention of whole samples in fp32, [B, h, T, d], without mask, dropout or causal order.

    In bf16 torch rounds the softmax before it mixes values; to be as exact as the kernel would take the result further
    from the model's own.
    """
    query, key, value, *rest = node.args
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | node.kwargs
    if options.get("attn_mask") is not None or options.get("dropout_p") or options.get("is_causal"):
        return "it has a mask, dropout or a causal order"
    values = [example_value(part) for part in (query, key, value) if isinstance(part, fx.Node)]
    if any(found.dtype != torch.float32 or found.dim() != 4 for found in values):
        return "it is not of fp32 heads [B, h, T, d]"
    tokens: Any = values[1].shape[2]
    most = own_attention_up_to()
    if not isinstance(tokens, int) or tokens > most:
        return f"torch is as fast above {most} tokens" if most else "torch is as fast"
    replace_call(module, node, family.op("attention"), query, key, value, options.get("scale"))
    return None


def lower_attention_rows(module: fx.GraphModule, node: fx.Node, family: Family) -> str | None:
    """Attention of a few rows, without padding."""
    query, key, value, *rest = node.args
    assert isinstance(key, fx.Node) and isinstance(value, fx.Node)
    counter = node.meta.get(SCALES_WITH)
    held = (as_stored(key, family), as_stored(value, family))
    if held[0] is not key and held[1] is not value:  # the kernel takes both in one dtype
        key, value = held
    made = replace_call(module, node, family.op("attention_rows"), query, key, value, *rest)
    if counter is not None:  # the kernel pads nothing
        made.meta[SCALES_WITH] = Counter(counter.site, "attention_rows")
    return None
