"""vectorize_experts: replace each experts marker by one grouped computation over stacked weights.

    y = moeca.experts(x, ids, w, 'blocks.1.mlp.experts.forward')
                                  |
                                  v
    branch, row_expert, offsets = plan_branches(ids, E)        group branches by expert
    rows    = gather_branches(x, branch, k)                    [N*k, H]
    h       = self.blocks_1_mlp_experts(rows, row_expert, offsets)
    feature = ungroup_branches(h, branch)                      [N*k, H] in branch order
    y       = combine_branches(feature, w, x)

Worth having without any cache: no Python loop over experts, no host round trip a layer, exportable.
"""

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx, nn

from moeca_fx.discover import MoERegion
from moeca_fx.discover.experts import expert_modules
from moeca_fx.errors import PassError
from moeca_fx.graph.expert_program import build_expert_program
from moeca_fx.graph.rewrite import call, copy_meta, example_value, finish
from moeca_fx.graph.sites import MoESite, Sites
from moeca_fx.ops import dispatch


def vectorize_experts(
    module: fx.GraphModule, sites: Sites, regions: Mapping[str, MoERegion], model: nn.Module
) -> Sites:
    """Lower every marker, in place; sites that are vectorised already are left.

    Args:
        module: located graph.
        sites: from `locate`.
        regions: marker key -> proven region.
        model: the model whose experts share stacked storage already (`stack_in_place`).

    Returns:
        The sites with the new node names.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    updated = tuple(
        _vectorize(module, site, nodes[site.experts], regions, model)
        if isinstance(site, MoESite) and not site.feature
        else site
        for site in sites.ordered
    )
    finish(module, "vectorize_experts")
    if module.graph.find_nodes(op="call_function", target=torch.ops.moeca.experts.default):
        raise PassError("vectorize_experts left an experts marker behind; please report this model")
    return replace(sites, ordered=updated)


def _vectorize(
    module: fx.GraphModule, site: MoESite, marker: fx.Node, regions: Mapping[str, MoERegion], model: nn.Module
) -> MoESite:
    x, expert, weight, key = marker.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node), f"{marker.name}: operands are nodes"
    region = regions[str(key)]
    value = example_value(x)
    experts = expert_modules(model, region)
    parameter = next(iter(experts[0].parameters()))
    example = torch.zeros(4, value.shape[-1], dtype=value.dtype, device=parameter.device)
    base = site.path.replace(".", "_")
    program_name = f"{base}_experts"
    module.add_submodule(program_name, build_expert_program(region.path, experts, example))
    graph = module.graph
    with graph.inserting_before(marker):
        plan = call(graph, dispatch.plan_branches, expert, site.num_experts, name=f"{base}_plan")
        branch, row_expert, offsets = (
            call(graph, operator.getitem, plan, index, name=f"{base}_{name}")
            for index, name in enumerate(("branch", "row_expert", "offsets"))
        )
        rows = call(graph, dispatch.gather_branches, x, branch, site.top_k, name=f"{base}_rows")
        hidden = graph.create_node("call_module", program_name, (rows, row_expert, offsets), name=f"{base}_hidden")
        feature = call(graph, dispatch.ungroup_branches, hidden, branch, name=f"{base}_feature")
        combined = call(graph, dispatch.combine_branches, feature, weight, x, name=f"{base}_combined", like=marker)
    for node in (plan, branch, row_expert, offsets, rows, hidden, feature):
        node.meta["nn_module_stack"] = marker.meta.get("nn_module_stack", {})
    copy_meta(marker, combined)
    name = marker.name
    marker.replace_all_uses_with(combined)
    graph.erase_node(marker)
    output = combined.name if site.output == name else site.output
    return replace(site, experts=combined.name, feature=feature.name, output=output)
