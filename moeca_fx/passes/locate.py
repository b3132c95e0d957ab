"""locate: find attention, MoE and dense feed-forward sites in the graph and record them; the graph is not changed.

    q, k, v = ...(x)                                     AttentionSite(core=sdpa, output=proj, gate=..,
    sdpa = scaled_dot_product_attention(q, k, v)                       residual_in=x, residual_out=x1)
    x1 = x + gate * proj(sdpa)                     -->
    experts = moeca.experts(rows(x1), ids, w, ..)        MoESite(experts=experts, shared=.., residual_in=x1,
    x2 = x1 + gate * (experts + shared(rows(x1)))                residual_out=x2, attention='blocks.1.attn')

Sites are found by dataflow alone: from the core forward to the addition that closes the residual, and from there back.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from moeca_fx.discover import Layout, MoERegion
from moeca_fx.errors import UnprovenRegionError, UnsupportedModelError
from moeca_fx.graph.layout import STREAM, NotTokenWise, TokenAxes, propagate, shape_of
from moeca_fx.graph.rewrite import module_path
from moeca_fx.graph.sites import AnySite, AttentionSite, DenseFFNSite, MoESite, Site, Sites
from moeca_fx.graph.slicing import (
    LINEAR,
    Residual,
    addends,
    ancestors,
    between,
    closing_residual,
    same_shape,
    strip_reshapes,
    with_gate,
)
from moeca_fx.ops.experts import is_marker
from moeca_fx.passes.empty_ids import columns, may_be_empty
from moeca_fx.passes.locate_attention import SDPA, attention_sites, stream_tokens
from moeca_fx.passes.router_form import describe_router
from moeca_fx.reasons import Reason


def locate(module: fx.GraphModule, regions: dict[str, MoERegion]) -> Sites:
    """Record every site of a normalised graph.

    Args:
        module: captured and normalised; experts are still markers.
        regions: marker key -> proven region.

    Raises:
        UnsupportedModelError: a MoE layer has no residual addition over a token stream [B, T, H].
    """
    left: list[tuple[str, str]] = []
    cores = module.graph.find_nodes(op="call_function", target=SDPA)
    attention = _with_own_paths([site for node in cores for site in attention_sites(node, left)], set())
    moe = [_moe(node, regions[str(node.args[3])], attention) for node in module.graph.nodes if is_marker(node)]
    taken = {site.residual_out for site in attention} | {site.residual_out for site in moe}
    others = [node for node in module.graph.nodes if node.name not in taken]
    moe = _with_own_paths(moe, {site.path for site in attention})
    dense = [ffn for node in others if (ffn := _dense_ffn(node, left))]
    dense = _with_own_paths(dense, {site.path for site in attention} | {site.path for site in moe})
    order = {node.name: index for index, node in enumerate(module.graph.nodes)}
    sites: list[Site] = [*attention, *moe, *dense]
    return Sites(tuple(sorted(sites, key=lambda site: order[site.residual_out])), tuple(left))


def _with_own_paths(sites: list[AnySite], taken: set[str]) -> list[AnySite]:
    """Number sites that share a module path (two attentions written in one forward), so that each has its own."""
    own: list[AnySite] = []
    for site in sites:
        path, count = site.path, 1
        while path in taken:
            count += 1
            path = f"{site.path}_{count}"
        taken.add(path)
        own.append(replace(site, path=path))
    return own


def _moe(marker: fx.Node, region: MoERegion, attention: list[AttentionSite]) -> MoESite:
    residual = closing_residual(marker)
    tokens = stream_tokens(residual)
    if residual is None or tokens is None:
        raise UnsupportedModelError(
            f"{region.block}: expected a residual addition over a token stream [B, T, H] with a fixed number of tokens "
            "after the experts, found none; write the block as x + gate * moe(x)",
            code=Reason.NO_RESIDUAL,
        )
    x, expert, weight = (operand for operand in marker.args[:3] if isinstance(operand, fx.Node))
    try:
        axes = propagate({residual.residual_in: STREAM}, between([residual.residual_in], [x]))
    except NotTokenWise as problem:
        raise UnsupportedModelError(
            f"{region.block}: the experts' input mixes tokens: {problem}", code=Reason.MIXES_TOKENS
        ) from problem
    if axes[x] not in (STREAM, TokenAxes(0, 0)):
        problem_found = "the experts' rows are not ordered sample by sample"
        raise UnsupportedModelError(f"{region.block}: {problem_found}", code=Reason.MIXES_TOKENS)
    if region.layout == "token" and not region.empty_slots and columns(expert) > region.num_experts:
        raise UnprovenRegionError(
            f"{region.block}: its router chooses among {columns(expert)}, it has {region.num_experts} experts, and no "
            "token of the example inputs was sent beyond them, so that what happens there is not known; pass example "
            "inputs that differ more",
            code=Reason.EXPERTS_DID_NOT_RUN,
        )
    shared = _shared_expert(marker, x, residual)
    companion = next((site for site in attention if site.residual_out == residual.residual_in.name), None)
    # How many tokens an expert takes goes with the number of tokens, which may be another than in the proof.
    top_k = region.top_k if region.layout == "token" else int(shape_of(expert)[-1])
    return MoESite(
        path=region.block,
        region=f"{region.path}.{region.method}",
        experts=marker.name,
        x=x.name,
        expert=expert.name,
        weight=weight.name,
        num_experts=region.num_experts,
        top_k=top_k,
        router=_FORMS[region.layout].format(describe_router(x, expert, weight, residual.residual_in)),
        shared=shared.name if shared else None,
        shared_root=strip_reshapes(x).name if shared else None,
        shared_path=_common_path(_linears(strip_reshapes(x), shared)) if shared else None,
        output=residual.output.name,
        gate=residual.gate.name if residual.gate else None,
        residual_in=residual.residual_in.name,
        residual_out=residual.residual_out.name,
        attention=companion.path if companion else None,
        tokens=tokens,
        not_synchronized=_WHY_NOT_BY_ROWS[region.layout](marker, companion, top_k) if companion else None,
        layout=region.layout,
        empty_slots=region.layout == "token" and (region.empty_slots or may_be_empty(expert)),
    )


def _why_not_routed_by_rows(marker: fx.Node, attention: AttentionSite, top_k: int) -> str | None:
    """None when expert ids, weights and token rows follow from the attention output of each token alone."""
    start = next(node for node in marker.graph.nodes if node.name == attention.output)
    wanted = [strip_reshapes(operand) for operand in marker.args[:3] if isinstance(operand, fx.Node)]
    try:
        axes = propagate({start: STREAM}, between([start], wanted))
    except NotTokenWise as problem:
        return f"routing of single tokens: {problem}"
    for node in wanted[1:]:
        expected = {2: TokenAxes(0, 0), 3: STREAM}.get(len(shape_of(node)))
        if axes[node] != expected or shape_of(node)[-1] != top_k:
            return f"routing of single tokens: node {node.name} is not laid out [B*T, k] or [B, T, k]"
    return None


def _experts_choose(marker: fx.Node, attention: AttentionSite, capacity: int) -> str:
    return "expert choice: each expert takes its tokens from all of a sample, so single tokens cannot be routed again"


_FORMS: dict[Layout, str] = {"token": "{}", "expert": "expert choice, {}"}
_WHY_NOT_BY_ROWS: dict[Layout, Callable[[fx.Node, AttentionSite, int], str | None]] = {
    "token": _why_not_routed_by_rows,
    "expert": _experts_choose,
}


def _shared_expert(marker: fx.Node, x: fx.Node, residual: Residual) -> fx.Node | None:
    """The branch added to the routed output that is computed from the same tokens by at least two matrices."""
    root = strip_reshapes(x)
    reached = {marker}
    for node in between([marker], [residual.residual_out]):
        operands = addends(node)
        if operands is not None and node is not residual.residual_out:
            outside = [operand for operand in operands if operand not in reached]
            if len(outside) == 1 and same_shape(outside[0], node) and _is_shared_expert(marker, root, outside[0]):
                return outside[0]
        reached.add(node)
    return None


def _is_shared_expert(marker: fx.Node, root: fx.Node, branch: fx.Node) -> bool:
    """At least two matrices on each token alone, without the routing: identity experts add rows by their weights."""
    if len(_linears(root, branch)) < 2 or not {marker.args[1], marker.args[2]}.isdisjoint(ancestors([branch])):
        return False
    try:
        propagate({root: STREAM if len(shape_of(root)) == 3 else TokenAxes(0, 0)}, between([root], [branch]))
    except NotTokenWise:
        return False  # computed at every step, as everything that no pass knows
    return True


def _linears(root: fx.Node, output: fx.Node) -> list[fx.Node]:
    return [node for node in between([root], [output]) if node.target in LINEAR]


def _dense_ffn(addition: fx.Node, left: list[tuple[str, str]]) -> DenseFFNSite | None:
    """A residual over a token-wise branch with at least two matrices and neither attention nor experts in it."""
    operands = addends(addition)
    if operands is None or not same_shape(*operands):
        return None
    for stream, branch in (operands, operands[::-1]):
        if stream not in ancestors([branch]):
            continue
        inside = between([stream], [branch])
        residual = with_gate(addition, stream, branch, set(inside))
        tokens = stream_tokens(residual)
        linears = [node for node in inside if node.target in LINEAR]
        if len(linears) < 2 or tokens is None:
            return None
        if any(node.target is SDPA or is_marker(node) for node in inside):
            return None
        path = _common_path(linears)
        try:
            axes = propagate({stream: STREAM}, between([stream], [residual.output]))
        except NotTokenWise as problem:
            left.append((path, f"feed-forward computed in full: {problem}"))
            return None
        if axes[residual.output] != STREAM:
            return None
        return DenseFFNSite(
            path=path,
            output=residual.output.name,
            gate=residual.gate.name if residual.gate else None,
            residual_in=stream.name,
            residual_out=addition.name,
            tokens=tokens,
        )
    return None


def _common_path(nodes: list[fx.Node]) -> str:
    """Longest module path that all nodes share."""
    paths = [module_path(node).split(".") for node in nodes]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) != 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
