"""A full step: the graph computes as before and hands every state out.

feature = ungroup_branches(...)           feature = ungroup_branches(...)
return (eps,)                      -->    cache_feature = slot_features(feature, T, k)   [B, T, k, H]
                                          return (eps, ..., cache_feature, ...)
"""

from collections.abc import Callable, Sequence

from moeca_fx.discover import Layout
from moeca_fx.graph.layout import HEADS
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite
from moeca_fx.ops import rows
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.expert_choice_full import store_chosen
from moeca_fx.passes.cache.moe_full import store_moe
from moeca_fx.passes.cache.plan import SitePlan
from moeca_fx.policies.rules import BranchRule

_STORES: dict[Layout, Callable[[StepBuilder, SitePlan, MoESite, BranchRule], None]] = {
    "token": store_moe,
    "expert": store_chosen,
}


def store_branch_states(step: StepBuilder, plans: Sequence[SitePlan], rule: BranchRule) -> None:
    """Add the nodes that compute every state of a branch rule."""
    for plan in plans:
        if not plan.states:
            continue
        if isinstance(plan.site, AttentionSite):
            _store_attention(step, plan, plan.site)
        elif isinstance(plan.site, MoESite):
            _STORES[plan.site.layout](step, plan, plan.site, rule)
        else:
            _store_output(step, plan.site, "ffn")


def _store_output(step: StepBuilder, site: AttentionSite | DenseFFNSite, kind: str) -> None:
    state = f"{site.path}.{kind}"
    arguments = (step.nodes[site.output], 0, 1, site.tokens)
    step.store(state, step.emit(rows.tokens_first, *arguments, name="new_" + state.replace(".", "_")))


def _store_attention(step: StepBuilder, plan: SitePlan, site: AttentionSite) -> None:
    _store_output(step, site, "attn")
    kept = {state.kind for state in plan.states}
    for kind, name in (("key", site.key), ("value", site.value)):
        if kind in kept:
            value = (step.nodes[name], HEADS.batch, HEADS.token, site.tokens)
            step.updated[f"{site.path}.{kind}"] = step.emit(
                rows.tokens_first, *value, name=f"new_{site.path}_{kind}".replace(".", "_")
            )
