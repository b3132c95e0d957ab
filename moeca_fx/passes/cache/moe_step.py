"""A MoE site on a cached step: run the branches that `moe_decision` picked, combine them with the cached ones.

y = experts(x, ids, w)   -->   feature = write_rows(cache_feature, branch, experts(x[picked]))
                               y       = combine_slots(feature, weight by slot)
"""

from torch import fx

from moeca_fx.graph.sites import AttentionSite, MoESite
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.ops import dispatch, forecast, present, rows, slots
from moeca_fx.passes.cache.attention_step import AttentionPrograms
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.moe_decision import Decision, decide_all, decide_synchronized
from moeca_fx.passes.cache.moe_history import correct_features
from moeca_fx.passes.cache.moe_programs import MoEPrograms, run_shared
from moeca_fx.policies.rules import BranchRule


def rewrite_moe(
    step: StepBuilder,
    site: MoESite,
    programs: MoEPrograms,
    rule: BranchRule,
    attention: tuple[AttentionSite, AttentionPrograms] | None,
) -> None:
    """Rewrite the site; `attention` is given when it is synchronized with this site."""
    if attention is None:
        decision = decide_all(step, site, rule)
    else:
        assert programs.routing is not None, f"{site.path}: synchronized without a routing program"
        decision = decide_synchronized(step, site, rule, programs.routing, *attention)
    _run_experts(step, site, decision, programs)
    if programs.shared is not None:
        mask = _shared_mask(step, site, rule, decision.code)
        run_shared(step, site, rule, decision.x, mask, programs, decision.row)
    if site.empty_slots:
        counted = (decision.expert, site.num_experts)
        step.count(site.path, "present", present.count_present, *counted)
        step.count(site.path, "matched", present.count_matched_present, decision.code, *counted)
    else:
        step.count(site.path, "matched", slots.count_matched, decision.code, step.cache[f"{site.path}.expert"])
    step.count(site.path, "recomputed", slots.count_recomputed, decision.code)


def _run_experts(step: StepBuilder, site: MoESite, decision: Decision, programs: MoEPrograms) -> None:
    """Run the picked branches only; reused features stay where they are (points 4 and 5)."""
    base = site.path.replace(".", "_")
    plan = step.emit(
        dispatch.plan_recomputed,
        decision.code,
        decision.slot_expert,
        decision.row,
        site.num_experts,
        name=f"{base}_plan",
    )
    names = tuple(f"{base}_{part}" for part in ("branch", "local", "row_expert", "offsets"))
    picked, local, row_expert, offsets = step.unpack(plan, *names)
    inputs = step.emit(dispatch.take_rows, decision.x, local, name=f"{base}_rows")
    hidden = step.graph.create_node(
        "call_module", f"{base}_experts", (inputs, row_expert, offsets), name=f"{base}_hidden"
    )
    hidden.meta[SCALES_WITH] = Counter(site.path, "recomputed")
    if f"{site.path}.norm" in step.cache:
        norm = step.emit(dispatch.feature_norm, hidden, name=f"{base}_hidden_norm")
        step.write(f"{site.path}.norm", picked, norm)
    if step.terms == 1:
        feature = step.write(f"{site.path}.feature", picked, hidden)
        combined = step.emit(dispatch.combine_slots, feature, decision.weight, name=f"{base}_combined")
    else:
        features = correct_features(step, site, decision.code, picked, local, hidden)
        combined = step.emit(forecast.combine_history, step.clock, decision.weight, *features, name=f"{base}_combined")
    axes = programs.x_axes
    result = step.emit(rows.tokens_back, combined, axes.batch, axes.token, name=f"{base}_routed")
    step.replace(step.nodes[site.experts], result)


def _shared_mask(step: StepBuilder, site: MoESite, rule: BranchRule, code: fx.Node) -> fx.Node:
    """Entries of the decision whose shared expert runs: with a recomputed branch, or all under `force`."""
    recomputed = (slots.token_mask, code)
    forced = rule.shared_expert == "reuse" and step.force is not None
    chosen_by = (slots.forced_tokens, code, step.force) if forced else recomputed
    return step.emit(*chosen_by, name=f"{site.path}_shared_mask".replace(".", "_"))
