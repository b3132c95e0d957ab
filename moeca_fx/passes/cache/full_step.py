"""A full step: the graph computes as before and hands every state out.

feature = ungroup_branches(...)           feature = ungroup_branches(...)
return (eps,)                      -->    cache_feature = slot_features(feature, T, k)   [B, T, k, H]
                                          return (eps, ..., cache_feature, ...)
"""

from collections.abc import Sequence

from torch import fx

from moeca_fx.graph.layout import HEADS
from moeca_fx.graph.rewrite import call
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite
from moeca_fx.ops import dispatch, rows, slots
from moeca_fx.passes.cache.plan import SitePlan, shared_axes
from moeca_fx.policies import MoECa, branch


def insert_full_step(
    module: fx.GraphModule, plans: Sequence[SitePlan], policy: MoECa, carried: dict[str, fx.Node]
) -> dict[str, fx.Node]:
    """Add the nodes that compute every state; returns them by state name.

    Args:
        module: vectorised graph, edited in place.
        carried: graph inputs of the states that a full step reads.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    stored: dict[str, fx.Node] = {}
    with module.graph.inserting_before(module.graph.output_node()):
        for plan in plans:
            if not plan.states:
                continue
            if isinstance(plan.site, AttentionSite):
                _store_attention(module.graph, plan, plan.site, nodes, stored)
            elif isinstance(plan.site, MoESite):
                _store_moe(module.graph, plan, plan.site, nodes, policy, carried, stored)
            else:
                _store_output(module.graph, plan.site, nodes[plan.site.output], "ffn", stored)
    return stored


def _store_output(
    graph: fx.Graph, site: AttentionSite | DenseFFNSite, output: fx.Node, kind: str, stored: dict[str, fx.Node]
) -> None:
    name = f"{site.path}.{kind}"
    stored[name] = call(graph, rows.tokens_first, output, 0, 1, site.tokens, name=_readable(name))


def _store_attention(
    graph: fx.Graph, plan: SitePlan, site: AttentionSite, nodes: dict[str, fx.Node], stored: dict[str, fx.Node]
) -> None:
    _store_output(graph, site, nodes[site.output], "attn", stored)
    kept = {state.kind for state in plan.states}
    for kind, name in (("key", site.key), ("value", site.value)):
        if kind in kept:
            full_name = f"{site.path}.{kind}"
            arguments = (nodes[name], HEADS.batch, HEADS.token, site.tokens)
            stored[full_name] = call(graph, rows.tokens_first, *arguments, name=_readable(full_name))


def _store_moe(
    graph: fx.Graph,
    plan: SitePlan,
    site: MoESite,
    nodes: dict[str, fx.Node],
    policy: MoECa,
    carried: dict[str, fx.Node],
    stored: dict[str, fx.Node],
) -> None:
    def store(kind: str, target: object, *args: object) -> fx.Node:
        name = f"{site.path}.{kind}"
        stored[name] = call(graph, target, *args, name=_readable(name))  # type: ignore[arg-type]
        return stored[name]

    size = (site.tokens, site.top_k)
    expert = store("expert", slots.slots, nodes[site.expert], *size)
    store("weight", slots.stored_weight, nodes[site.weight], *size, policy.score_weight)
    feature = store("feature", slots.slot_features, nodes[site.feature], *size)
    store("norm", dispatch.feature_norm, feature)
    before = carried[f"{site.path}.activation"]
    store("activation", branch.update_activation, before, expert, policy.beta)
    if any(state.kind == "shared" for state in plan.states):
        _, axes = shared_axes(site, nodes)
        store("shared", rows.tokens_first, nodes[site.shared or ""], axes.batch, axes.token, site.tokens)


def _readable(name: str) -> str:
    return "new_" + name.replace(".", "_")
