"""Attention sites: from each attention forward to the addition of every token stream that it answers.

    q = cat(q_image, q_text)                                      two sites with one core:
    sdpa = scaled_dot_product_attention(q, k, v)            -->     attn1     image stream, tokens 0 to 1023
    image = image + gate_i * proj_i(sdpa[:, :1024])                 attn1_2   text stream, tokens 1024 to 1151
    text = text + gate_t * proj_t(sdpa[:, 1024:])

With all its sites reused, the core itself is no longer computed.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moeca_fx.graph.layout import HEADS, STREAM, NotTokenWise, TokenAxes, propagate, shape_of
from moeca_fx.graph.rewrite import example_value, module_path
from moeca_fx.graph.sites import AttentionSite
from moeca_fx.graph.slicing import Residual, between, closing_residuals

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)


def attention_sites(core: fx.Node, left: list[tuple[str, str]]) -> list[AttentionSite]:
    """The sites of one attention; what has none is appended to `left`, with the reason."""
    path = module_path(core) or core.name
    query, key, value = (operand for operand in core.args[:3] if isinstance(operand, fx.Node))
    sites = []
    for residual in closing_residuals(core):
        tokens = stream_tokens(residual)
        if tokens is None:
            continue
        site = AttentionSite(
            path=path,
            core=core.name,
            query=query.name,
            key=key.name,
            value=value.name,
            output=residual.output.name,
            gate=residual.gate.name if residual.gate else None,
            residual_in=residual.residual_in.name,
            residual_out=residual.residual_out.name,
            tokens=tokens,
            refused=_why_not_by_rows(core, (query, key, value), residual, tokens),
        )
        if _attends(query) > tokens:
            site = replace(site, joint=True, first_token=_first_token(core, residual.output))
        sites.append(site)
    if not sites:
        left.append((path, "attention without a residual addition over a token stream [B, T, H]; computed in full"))
    return sites


def stream_tokens(residual: Residual | None) -> int | None:
    """T when the residual runs over [B, T, H] with T fixed."""
    value = example_value(residual.residual_in) if residual else None
    if isinstance(value, torch.Tensor) and value.dim() == 3 and isinstance(value.shape[1], int):
        return value.shape[1]
    return None


def _why_not_by_rows(core: fx.Node, qkv: tuple[fx.Node, ...], residual: Residual, tokens: int) -> str | None:
    """None when queries, keys, values and the output projection are proven to act on each token alone."""
    masked = len(core.args) > 3 and core.args[3] is not None
    if masked or core.kwargs.get("attn_mask") is not None or core.kwargs.get("is_causal") or len(core.args) > 4:
        return "attention with a mask cannot be recomputed for single rows"
    stream = residual.residual_in
    if _attends(qkv[0]) > tokens:
        return (
            f"joint attention over {_attends(qkv[0])} tokens, of which this stream has {tokens}, cannot be "
            "recomputed for single rows"
        )
    try:
        axes = propagate({stream: STREAM}, between([stream], qkv))
        if any(axes.get(node) != HEADS for node in qkv):
            return "queries, keys and values are not laid out [B, h, T, d]"
        after = propagate({core: HEADS}, between([core], [residual.output]))
    except NotTokenWise as problem:
        return str(problem)
    return None if after.get(residual.output) == STREAM else "the output is not laid out [B, T, H]"


def _attends(query: fx.Node) -> int:
    """Tokens that attend, for queries laid out [B, h, T, d]; 0 otherwise."""
    shape = shape_of(query)
    return shape[HEADS.token] if len(shape) == 4 else 0


def _first_token(core: fx.Node, output: fx.Node) -> int | None:
    """Position among the attention's tokens of the first that `output` is for; None where it cannot be told."""
    axes: dict[fx.Node, TokenAxes] = {core: HEADS}
    for node in between([core], [output]):
        source: Any = node.args[0]
        have = axes.get(source)
        if have is not None and node.target in _SPLITS and _dim(node, 2) == have.token:
            return _start_of_part(node, output)
        if have is not None and node.target is aten.slice.Tensor and _dim(node, 1) == have.token:
            return int(node.args[2]) if len(node.args) > 2 else 0  # type: ignore[arg-type]  # a number
        try:
            axes = propagate(axes, [node])
        except NotTokenWise:
            return None
    return None


def _start_of_part(split: fx.Node, output: fx.Node) -> int | None:
    parts = [user for user in split.users if user is output or between([user], [output])]
    if len(parts) != 1:
        return None
    index: Any = parts[0].args[1]
    sizes: Any = split.args[1]
    return int(sum(sizes[:index])) if isinstance(sizes, list | tuple) else int(sizes) * int(index)


def _dim(node: fx.Node, position: int) -> int:
    source: Any = node.args[0]
    value: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return int(value) % len(shape_of(source))
