"""A MoE site whose experts chose their tokens, on a full step: what its slots [E, C] hold, in the router's order.

feature = ungroup_chosen(...)      -->    cache_token   = slots(token, E, C)                   [B, E, C]
                                          cache_weight  = stored_token_weight(weights, token)  [B, E, C]
                                          cache_feature = slot_features(feature, E, C)         [B, E, C, H]
"""

from moeca_fx.graph.sites import MoESite
from moeca_fx.ops import dispatch, slots
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.moe_full import compute, score_weight_of, store_older_features, store_shared
from moeca_fx.passes.cache.plan import SitePlan
from moeca_fx.policies import expert_choice
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold


def store_chosen(step: StepBuilder, plan: SitePlan, site: MoESite, rule: BranchRule) -> None:
    """Every state of the site."""
    path, nodes = site.path, step.nodes
    kinds = {state.kind for state in plan.states}
    token = compute(step, f"{path}.token", slots.slots, nodes[site.expert], *site.slots)
    weighing = (nodes[site.weight], token, site.tokens, score_weight_of(rule))
    compute(step, f"{path}.weight", expert_choice.stored_token_weight, *weighing)
    feature = compute(step, f"{path}.feature", slots.slot_features, nodes[site.feature], *site.slots)
    if "norm" in kinds:
        compute(step, f"{path}.norm", dispatch.feature_norm, feature)
    if step.terms > 1:
        store_older_features(step, site, rule, expert_choice.align_token_features, site.tokens)
    if "activation" in kinds:
        assert isinstance(rule.selector, ScoreThreshold)
        before = step.cache[f"{path}.activation"]
        compute(step, f"{path}.activation", expert_choice.update_chosen, before, token, rule.selector.beta)
    store_shared(step, plan, site)
