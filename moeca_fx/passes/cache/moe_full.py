"""A MoE site on a full step: what its slots hold, in the router's order.

feature = ungroup_branches(...)    -->    cache_expert  = slots(ids, T, k)                     [B, T, k]
                                          cache_weight  = stored_weight(weights, T, k)         [B, T, k]
                                          cache_feature = slot_features(feature, T, k)         [B, T, k, H]
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from moeca_fx.graph.sites import MoESite
from moeca_fx.graph.state import older
from moeca_fx.ops import dispatch, forecast, rows, slots
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.plan import SitePlan, needs_error, shared_axes
from moeca_fx.policies import branch, empty_slots
from moeca_fx.policies.branch import ScoreWeight
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold


def score_weight_of(rule: BranchRule) -> ScoreWeight:
    """What the kept weight is: as the rule's score reads it, else the share."""
    return rule.selector.score_weight


def compute(step: StepBuilder, state: str, target: object, *args: object) -> fx.Node:
    """Emit what a state is after the step."""
    step.updated[state] = step.emit(target, *args, name="new_" + state.replace(".", "_"))
    return step.updated[state]


def store_moe(step: StepBuilder, plan: SitePlan, site: MoESite, rule: BranchRule) -> None:
    """Every state of a site whose tokens chose their experts."""

    def store(kind: str, target: object, *args: object) -> None:
        compute(step, f"{site.path}.{kind}", target, *args)

    size, nodes = site.slots, step.nodes
    kinds = {state.kind for state in plan.states}
    store("expert", slots.slots, nodes[site.expert], *size)
    store("weight", slots.stored_weight, nodes[site.weight], *size, score_weight_of(rule))
    store("feature", slots.slot_features, nodes[site.feature], *size)
    if "norm" in kinds:
        store("norm", dispatch.feature_norm, step.updated[f"{site.path}.feature"])
    if step.terms > 1:
        store_older_features(step, site, rule, forecast.align_features)
    if "activation" in kinds:
        assert isinstance(rule.selector, ScoreThreshold)
        before, expert = step.cache[f"{site.path}.activation"], step.updated[f"{site.path}.expert"]
        updating = (before, expert, rule.selector.beta)
        if site.empty_slots:
            store("activation", empty_slots.update_activation, *updating, site.num_experts)
        else:
            store("activation", branch.update_activation, *updating)
    store_shared(step, plan, site)


def store_shared(step: StepBuilder, plan: SitePlan, site: MoESite) -> None:
    """The output of the shared expert, where it is kept."""
    if any(state.kind == "shared" for state in plan.states):
        _, axes = shared_axes(site, step.nodes)
        shared = (step.nodes[site.shared or ""], axes.batch, axes.token, site.tokens)
        state = f"{site.path}.shared"
        step.store(state, step.emit(rows.tokens_first, *shared, name="new_" + state.replace(".", "_")))


def store_older_features(
    step: StepBuilder, site: MoESite, rule: BranchRule, align: Callable[..., Tensor], *constants: object
) -> None:
    """What the slots held becomes older, reordered to the slots of now; and what the forecast would have missed.

    Args:
        align: ``align(held now, held before, feature, kept, *constants)``, as `forecast.align_features`.
    """
    names = older(f"{site.path}.feature", step.terms)
    held = f"{site.path}.{site.held}"
    feature = step.updated[names[0]]
    arguments = (step.updated[held], step.cache[held], feature)
    aligned = [
        step.emit(align, *arguments, step.cache[name], *constants, name=f"aligned_{name}".replace(".", "_"))
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
