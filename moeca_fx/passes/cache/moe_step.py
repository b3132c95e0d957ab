"""A MoE site on a cached step: run the branches that `moe_decision` picked, combine them with the cached ones.

y = experts(x, ids, w) + shared(x)   -->   feature = write_rows(cache_feature, branch, experts(x[picked]))
                                           y       = combine_slots(feature, weight by slot)
                                           shared  = write_rows(cache_shared, row, shared_rows(x[row]))
"""

from dataclasses import dataclass

import torch
from torch import fx

from moeca_fx.graph.layout import STREAM, TokenAxes
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import AttentionSite, MoESite
from moeca_fx.graph.slicing import strip_reshapes
from moeca_fx.graph.state import SCALES_WITH, Counter, older
from moeca_fx.ops import dispatch, forecast, rows, slots
from moeca_fx.passes.cache.attention_step import AttentionPrograms
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.moe_decision import Decision, decide_all, decide_synchronized
from moeca_fx.passes.cache.plan import SitePlan, axes_of_rows, shared_axes
from moeca_fx.policies.rules import BranchRule


@dataclass(frozen=True)
class MoEPrograms:
    """Row programs of a MoE site: fresh attention rows -> routing and token rows; token rows -> shared expert."""

    routing: RowProgram | None
    shared: RowProgram | None
    x_axes: TokenAxes
    shared_axes: TokenAxes | None


def build_moe_programs(
    module: fx.GraphModule, nodes: dict[str, fx.Node], site: MoESite, plan: SitePlan, attention: SitePlan | None
) -> MoEPrograms:
    """Build the programs from the unedited graph."""
    x = strip_reshapes(nodes[site.x])
    routing = shared = shared_layout = None
    if attention is not None and attention.action == "synchronized":
        assert isinstance(attention.site, AttentionSite)
        start = nodes[attention.site.output]
        wanted = [strip_reshapes(nodes[site.expert]), strip_reshapes(nodes[site.weight]), x]
        routing = build_row_program(module, {}, wanted, site.tokens, given={start: STREAM})
    if any(state.kind == "shared" for state in plan.states):
        root_axes, shared_layout = shared_axes(site, nodes)
        output = nodes[site.shared or ""]
        shared = build_row_program(module, {}, [output], site.tokens, given={nodes[site.shared_root or ""]: root_axes})
    return MoEPrograms(routing, shared, axes_of_rows(site, nodes), shared_layout)


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
    _run_shared(step, site, rule, decision, programs)
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
        features = _correct_features(step, site, decision, picked, local, hidden)
        combined = step.emit(forecast.combine_history, step.clock, decision.weight, *features, name=f"{base}_combined")
    axes = programs.x_axes
    result = step.emit(rows.tokens_back, combined, axes.batch, axes.token, name=f"{base}_routed")
    step.nodes[site.experts].replace_all_uses_with(result)


def _correct_features(
    step: StepBuilder, site: MoESite, decision: Decision, picked: fx.Node, local: fx.Node, hidden: fx.Node
) -> list[fx.Node]:
    """Kept features of computed branches: corrected by what the forecast missed, or begun anew where the expert is."""
    base, state = site.path.replace(".", "_"), f"{site.path}.feature"
    kept = step.kept(state)
    guess = step.emit(forecast.forecast_rows, step.clock, picked, *kept, name=f"{base}_guess_rows")
    change = step.emit(torch.sub, hidden, guess, name=f"{base}_missed")
    new = step.emit(slots.unmatched_rows, decision.code, local, picked, site.top_k, name=f"{base}_new_rows")
    features = []
    for name, cache in zip(older(state, step.terms), kept, strict=True):
        node_name = "new_" + name.replace(".", "_")
        step.updated[name] = step.emit(forecast.restart_rows, cache, picked, change, hidden, new, name=node_name)
        features.append(step.updated[name])
    return features


def _run_shared(step: StepBuilder, site: MoESite, rule: BranchRule, decision: Decision, programs: MoEPrograms) -> None:
    """The shared expert of tokens with a recomputed branch (point 6)."""
    if programs.shared is None or programs.shared_axes is None:
        return
    base, state = site.path.replace(".", "_"), f"{site.path}.shared"
    if rule.shared_expert == "reuse" and step.force is None:
        step.keep(state)
        output = step.reused(state)
    else:
        recomputed = (slots.token_mask, decision.code)
        chosen_by = (slots.forced_tokens, decision.code, step.force) if rule.shared_expert == "reuse" else recomputed
        mask = step.emit(*chosen_by, name=f"{base}_shared_mask")
        chosen = step.emit(rows.select_rows, mask, name=f"{base}_shared_local")
        row = chosen
        if decision.row is not None:
            row = step.emit(rows.rows_of_rows, decision.row, chosen, name=f"{base}_shared_row")
        inputs = step.emit(dispatch.take_rows, decision.x, chosen, name=f"{base}_shared_x")
        given = {step.nodes[site.shared_root or ""]: inputs}
        names, counter = (f"{base}_shared_output",), Counter(site.path, "shared_rows")
        (fresh,) = step.run_program(programs.shared, row, f"{base}_shared_rows", names, counter, given)
        output = step.refresh(state, row, fresh)
        step.count(site.path, "shared_rows", slots.count_rows, row)
    axes = programs.shared_axes
    dense = step.emit(rows.tokens_back, output, axes.batch, axes.token, name=f"{base}_shared")
    step.nodes[site.shared or ""].replace_all_uses_with(dense)
