"""vectorize_experts: replace each experts marker by one grouped computation over stacked weights.

    y = moeca.experts(x, ids, w, 'blocks.1.mlp.experts.forward')
                                  |
                                  v
    branch, row_expert, offsets = plan_branches(ids, E)        group branches by expert
    rows    = gather_branches(x, branch, k)                    [N*k, H]
    h       = self.blocks_1_mlp_experts(rows, row_expert, offsets)
    feature = ungroup_branches(h, branch)                      [N*k, H] in branch order
    y       = combine_branches(feature, w, x)

Where experts chose their tokens (`ops.chosen`), groups are equal and known beforehand:

    y = moeca.expert_choice(x, token, w, '..')  -->  source, row_expert, offsets = plan_chosen(token, T)
                                                     h       = self.blocks_1_mlp_experts(x[source], ..)
                                                     feature = ungroup_chosen(h, token)          [B*E*C, H]
                                                     y       = combine_chosen(feature, token, w, x)

Where slots may be empty (`ops.present`), their weights become 0, and only the others are gathered and computed.

Worth having without any cache: no Python loop over experts, no host round trip a layer, exportable.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from moeca_fx.autocast import OFF, Autocast
from moeca_fx.discover import MoERegion
from moeca_fx.discover.experts import expert_modules
from moeca_fx.errors import PassError, UnsupportedModelError
from moeca_fx.graph.expert_program import build_expert_program
from moeca_fx.graph.rewrite import call, copy_meta, example_value, finish
from moeca_fx.graph.sites import Form, MoESite, Sites
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.ops import chosen, dispatch, present, slots
from moeca_fx.ops.experts import is_marker
from moeca_fx.reasons import Reason

aten = torch.ops.aten


def vectorize_experts(
    module: fx.GraphModule,
    sites: Sites,
    regions: Mapping[str, MoERegion],
    model: nn.Module,
    autocast: Autocast = OFF,
) -> Sites:
    """Lower every marker, in place; sites that are vectorised already are left.

    Args:
        module: located graph.
        sites: from `locate`.
        regions: marker key -> proven region.
        model: the model whose experts share stacked storage already (`stack_in_place`).
        autocast: what the experts run under.

    Returns:
        The sites with the new node names.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    updated = tuple(
        _vectorize(module, site, nodes[site.experts], regions, model, autocast)
        if isinstance(site, MoESite) and not site.feature
        else site
        for site in sites.ordered
    )
    finish(module, "vectorize_experts")
    if any(is_marker(node) for node in module.graph.nodes):
        raise PassError("vectorize_experts left an experts marker behind; please report this model")
    return replace(sites, ordered=updated)


def _vectorize(
    module: fx.GraphModule,
    site: MoESite,
    marker: fx.Node,
    regions: Mapping[str, MoERegion],
    model: nn.Module,
    autocast: Autocast,
) -> MoESite:
    x, _, _, key = marker.args
    assert isinstance(x, fx.Node), f"{marker.name}: operands are nodes"
    region = regions[str(key)]
    value = example_value(x)
    experts = expert_modules(model, region)
    parameter = next(iter(experts[0].parameters()))
    example = torch.zeros(4, value.shape[-1], dtype=value.dtype, device=parameter.device)
    base = site.path.replace(".", "_")
    with autocast.around():
        program = build_expert_program(region.path, experts, example)
    module.add_submodule(f"{base}_experts", program)
    weight = site.weight
    with module.graph.inserting_before(marker):
        if site.empty_slots:
            marker.update_arg(2, _zero_empty(module.graph, site, marker, base))
            weight = str(marker.args[2])
        made = _RUNS[site.form](module.graph, site, marker, base)
    *inner, feature, combined = made
    for node in (*inner, feature):
        node.meta["nn_module_stack"] = marker.meta.get("nn_module_stack", {})
    copy_meta(marker, combined)
    name = marker.name
    marker.replace_all_uses_with(combined)
    module.graph.erase_node(marker)
    output = combined.name if site.output == name else site.output
    return replace(site, experts=combined.name, feature=feature.name, weight=weight, output=output)


def _run_by_token(graph: fx.Graph, site: MoESite, marker: fx.Node, base: str) -> tuple[fx.Node, ...]:
    """Tokens chose their experts; the last two nodes are the feature and the combined result."""
    x, expert, weight, _ = marker.args
    plan = call(graph, dispatch.plan_branches, expert, site.num_experts, name=f"{base}_plan")
    branch, row_expert, offsets = _items(graph, plan, base, ("branch", "row_expert", "offsets"))
    rows = call(graph, dispatch.gather_branches, x, branch, site.top_k, name=f"{base}_rows")
    hidden = _hidden(graph, base, rows, row_expert, offsets)
    feature = call(graph, dispatch.ungroup_branches, hidden, branch, name=f"{base}_feature")
    combined = call(graph, dispatch.combine_branches, feature, weight, x, name=f"{base}_combined")
    return plan, branch, row_expert, offsets, rows, hidden, feature, combined


def _run_present(graph: fx.Graph, site: MoESite, marker: fx.Node, base: str) -> tuple[fx.Node, ...]:
    """`_run_by_token` of the slots that have an expert."""
    x, expert, weight, _ = marker.args
    code = call(graph, present.present_code, expert, site.num_experts, site.top_k, name=f"{base}_present")
    ids = call(graph, slots.slots, expert, 1, site.top_k, name=f"{base}_ids")
    plan = call(graph, dispatch.plan_recomputed, code, ids, None, site.num_experts, name=f"{base}_plan")
    branch, local, row_expert, offsets = _items(graph, plan, base, ("branch", "local", "row_expert", "offsets"))
    rows = call(graph, dispatch.take_rows, x, local, name=f"{base}_rows")
    hidden = _hidden(graph, base, rows, row_expert, offsets)
    hidden.meta[SCALES_WITH] = Counter(site.path, "present")
    feature = call(graph, present.spread, hidden, branch, code, name=f"{base}_feature")
    combined = call(graph, dispatch.combine_branches, feature, weight, x, name=f"{base}_combined")
    return code, ids, plan, branch, local, row_expert, offsets, rows, hidden, feature, combined


def _zero_empty(graph: fx.Graph, site: MoESite, marker: fx.Node, base: str) -> fx.Node:
    """The weights, 0 where the id is E, in operations that every router has; all that reads weights reads these."""
    _, expert, weight, _ = marker.args
    assert isinstance(expert, fx.Node) and isinstance(weight, fx.Node), f"{marker.name}: operands are nodes"
    ids, value = example_value(expert), example_value(weight)
    if ids.shape != value.shape:
        raise UnsupportedModelError(
            f"{site.path}: expected expert ids and weights of one shape where slots may be empty, found "
            f"{tuple(ids.shape)} and {tuple(value.shape)}; reshape one of them before the experts",
            code=Reason.SLOTS_OF_TWO_SHAPES,
        )
    there = call(graph, aten.eq.Scalar, expert, site.num_experts, name=f"{base}_absent")
    zeroed = call(graph, aten.masked_fill.Scalar, weight, there, 0.0, name=f"{base}_weight", like=weight)
    there.meta |= {"val": ids == site.num_experts, "nn_module_stack": marker.meta.get("nn_module_stack", {})}
    return zeroed


def _run_by_expert(graph: fx.Graph, site: MoESite, marker: fx.Node, base: str) -> tuple[fx.Node, ...]:
    """Experts chose their tokens; the last two nodes as there."""
    x, token, weight, _ = marker.args
    token = call(graph, slots.slots, token, *site.slots, name=f"{base}_token")
    plan = call(graph, chosen.plan_chosen, token, site.tokens, name=f"{base}_plan")
    source, row_expert, offsets = _items(graph, plan, base, ("source", "row_expert", "offsets"))
    rows = call(graph, dispatch.take_rows, x, source, name=f"{base}_rows")
    hidden = _hidden(graph, base, rows, row_expert, offsets)
    feature = call(graph, chosen.ungroup_chosen, hidden, token, name=f"{base}_feature")
    combined = call(graph, chosen.combine_chosen, feature, token, weight, x, name=f"{base}_combined")
    return token, plan, source, row_expert, offsets, rows, hidden, feature, combined


def _items(graph: fx.Graph, plan: fx.Node, base: str, names: tuple[str, ...]) -> tuple[fx.Node, ...]:
    return tuple(call(graph, operator.getitem, plan, i, name=f"{base}_{name}") for i, name in enumerate(names))


def _hidden(graph: fx.Graph, base: str, rows: fx.Node, row_expert: fx.Node, offsets: fx.Node) -> fx.Node:
    return graph.create_node("call_module", f"{base}_experts", (rows, row_expert, offsets), name=f"{base}_hidden")


_RUNS: dict[Form, Callable[[fx.Graph, MoESite, fx.Node, str], tuple[fx.Node, ...]]] = {
    "token": _run_by_token,
    "empty": _run_present,
    "expert": _run_by_expert,
}
