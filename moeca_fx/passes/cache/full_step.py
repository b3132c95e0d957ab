"""A full step: the graph computes as before and hands every state out.

feature = ungroup_branches(...)           feature = ungroup_branches(...)
return (eps,)                      -->    cache_feature = slot_features(feature, T, k)   [B, T, k, H]
                                          return (eps, ..., cache_feature, ...)
"""

from collections.abc import Sequence

import torch

from moeca_fx.graph.layout import HEADS
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite
from moeca_fx.graph.state import older
from moeca_fx.ops import dispatch, forecast, rows, slots
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.plan import SitePlan, needs_error, shared_axes
from moeca_fx.policies import branch
from moeca_fx.policies.branch import ScoreWeight
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold


def store_branch_states(step: StepBuilder, plans: Sequence[SitePlan], rule: BranchRule) -> None:
    """Add the nodes that compute every state of a branch rule."""
    for plan in plans:
        if not plan.states:
            continue
        if isinstance(plan.site, AttentionSite):
            _store_attention(step, plan, plan.site)
        elif isinstance(plan.site, MoESite):
            _store_moe(step, plan, plan.site, rule)
        else:
            _store_output(step, plan.site, "ffn")


def _compute(step: StepBuilder, state: str, target: object, *args: object) -> None:
    step.store(state, step.emit(target, *args, name="new_" + state.replace(".", "_")))


def _store_output(step: StepBuilder, site: AttentionSite | DenseFFNSite, kind: str) -> None:
    _compute(step, f"{site.path}.{kind}", rows.tokens_first, step.nodes[site.output], 0, 1, site.tokens)


def _store_attention(step: StepBuilder, plan: SitePlan, site: AttentionSite) -> None:
    _store_output(step, site, "attn")
    kept = {state.kind for state in plan.states}
    for kind, name in (("key", site.key), ("value", site.value)):
        if kind in kept:
            value = (step.nodes[name], HEADS.batch, HEADS.token, site.tokens)
            step.updated[f"{site.path}.{kind}"] = step.emit(
                rows.tokens_first, *value, name=f"new_{site.path}_{kind}".replace(".", "_")
            )


def score_weight_of(rule: BranchRule) -> ScoreWeight:
    """What the kept weight is: as the rule's score reads it, else the share."""
    return rule.selector.score_weight


def _store_moe(step: StepBuilder, plan: SitePlan, site: MoESite, rule: BranchRule) -> None:
    def store(kind: str, target: object, *args: object) -> None:
        state = f"{site.path}.{kind}"
        step.updated[state] = step.emit(target, *args, name="new_" + state.replace(".", "_"))

    size, nodes = (site.tokens, site.top_k), step.nodes
    kinds = {state.kind for state in plan.states}
    store("expert", slots.slots, nodes[site.expert], *size)
    store("weight", slots.stored_weight, nodes[site.weight], *size, score_weight_of(rule))
    store("feature", slots.slot_features, nodes[site.feature], *size)
    if "norm" in kinds:
        store("norm", dispatch.feature_norm, step.updated[f"{site.path}.feature"])
    if step.terms > 1:
        _store_older_features(step, site, rule)
    if "activation" in kinds:
        assert isinstance(rule.selector, ScoreThreshold)
        before, expert = step.cache[f"{site.path}.activation"], step.updated[f"{site.path}.expert"]
        store("activation", branch.update_activation, before, expert, rule.selector.beta)
    if "shared" in kinds:
        _, axes = shared_axes(site, nodes)
        shared = (nodes[site.shared or ""], axes.batch, axes.token, site.tokens)
        _compute(step, f"{site.path}.shared", rows.tokens_first, *shared)


def _store_older_features(step: StepBuilder, site: MoESite, rule: BranchRule) -> None:
    """What the slots held becomes older, reordered to the slots of now; and what the forecast would have missed."""
    names = older(f"{site.path}.feature", step.terms)
    expert, feature = step.updated[f"{site.path}.expert"], step.updated[names[0]]
    before = step.cache[f"{site.path}.expert"]
    aligned = [
        step.emit(
            forecast.align_features, expert, before, feature, step.cache[name], name=f"aligned_{name}".replace(".", "_")
        )
        for name in names
        if name in step.cache
    ]
    step.updated |= dict(zip(names[1:], aligned, strict=False))
    if needs_error(rule):
        assert step.clock is not None, f"{site.path}: the forecast's error needs the clock"
        base = site.path.replace(".", "_")
        missed = step.emit(forecast.forecast_error, step.clock, feature, *aligned, name=f"{base}_forecast_error")
        weight = step.updated[f"{site.path}.weight"]
        step.updated[f"{site.path}.error"] = step.emit(torch.mul, missed, weight, name=f"new_{base}_error")
