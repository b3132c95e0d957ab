"""A MoE site on a cached step (method sections 2 and 4): decide by branch, compute what was picked.

Without synchronized attention there is one routing, of all tokens. With it, a provisional routing on the cached
attention picks the tokens to refresh; only those are routed again after their attention was recomputed:

    expert', w' = router(x + gate * cache_attn)                        all tokens, a copy of the model's own nodes
    mask        = token_mask(decide(expert', w', caches, threshold))
    expert, w, x = routing_rows(row, fresh attention rows)             refreshed tokens only
    code        = decide(expert, w, cached rows, threshold)
    feature     = write_rows(cache_feature, branch, experts(x[picked]))
    y           = combine_slots(feature, weight by slot)
"""

from dataclasses import dataclass

from torch import fx

from moeca_fx.graph.layout import STREAM, TokenAxes
from moeca_fx.graph.rewrite import clone_nodes
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import AttentionSite, MoESite
from moeca_fx.graph.slicing import between, strip_reshapes
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.ops import dispatch, rows, slots
from moeca_fx.passes.cache.attention_step import AttentionPrograms, refresh_attention
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.plan import SitePlan, axes_of_rows, shared_axes
from moeca_fx.policies import branch


@dataclass(frozen=True)
class MoEPrograms:
    """Row programs of a MoE site: fresh attention rows -> routing and token rows; token rows -> shared expert."""

    routing: RowProgram | None
    shared: RowProgram | None
    x_axes: TokenAxes
    shared_axes: TokenAxes | None


@dataclass(frozen=True)
class Decision:
    """What was decided, over all tokens (`row` is None) or over the rows `row`; entries are [.., k] in slot order.

    Attributes:
        x: token rows that the experts read.
        expert: final experts of all tokens [B, T, k], branch order.
        weight: current routing weights of all tokens [B, T, k], slot order.
    """

    row: fx.Node | None
    code: fx.Node
    slot_expert: fx.Node
    x: fx.Node
    expert: fx.Node
    weight: fx.Node


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
    attention: tuple[AttentionSite, AttentionPrograms] | None,
) -> None:
    """Rewrite the site; `attention` is given when it is synchronized with this site."""
    if attention is None:
        decision = _decide_all(step, site)
    else:
        decision = _decide_synchronized(step, site, programs, *attention)
    _run_experts(step, site, decision, programs)
    _run_shared(step, site, decision, programs)
    step.count(site.path, "matched", slots.count_matched, decision.code, step.cache[f"{site.path}.expert"])
    step.count(site.path, "recomputed", slots.count_recomputed, decision.code)


def _decide_all(step: StepBuilder, site: MoESite) -> Decision:
    """One routing of all tokens."""
    base = site.path.replace(".", "_")
    expert, weight = (
        _by_slot_shape(step, site, step.nodes[site.expert]),
        _by_slot_shape(step, site, step.nodes[site.weight]),
    )
    threshold = _threshold(step, site, expert)
    held = _held(step, site)
    slot, slot_expert, slot_weight, code = _decide(step, f"{base}", expert, weight, held, threshold)
    step.refreshed = step.emit(slots.token_mask, code, name=f"{base}_refresh")
    step.updated[f"{site.path}.expert"] = slot_expert
    then = held[1]
    step.updated[f"{site.path}.weight"] = step.emit(
        slots.refreshed_weight, code, slot_weight, then, name=f"new_{base}_weight"
    )
    by_slot = step.emit(branch.to_slots, weight, slot, name=f"{base}_weight_by_slot")
    _store_activation(step, site, expert)
    return Decision(None, code, slot_expert, step.nodes[site.x], expert, by_slot)


def _decide_synchronized(
    step: StepBuilder,
    site: MoESite,
    programs: MoEPrograms,
    attention: AttentionSite,
    attention_programs: AttentionPrograms,
) -> Decision:
    """Provisional routing of all tokens, attention of the refreshed ones, final routing of those (points a to d)."""
    assert programs.routing is not None, f"{site.path}: synchronized without a routing program"
    base = site.path.replace(".", "_")
    output = step.nodes[attention.output]
    expert, weight = _provisional_routing(step, site, attention)
    threshold = _threshold(step, site, expert)
    held = _held(step, site)
    slot, slot_expert, _, code = _decide(step, f"{base}_provisional", expert, weight, held, threshold)
    step.refreshed = step.emit(slots.token_mask, code, name=f"{base}_refresh")
    row, fresh = refresh_attention(step, attention, step.refreshed, attention_programs)
    output.replace_all_uses_with(step.updated[f"{attention.path}.attn"])

    names = tuple(f"{base}_{part}_rows" for part in ("expert", "weight", "x"))
    counter = Counter(attention.path, "attention_rows")
    final = step.run_program(programs.routing, row, f"{base}_routing_rows", names, counter, {output: fresh})
    row_expert, row_weight = (_one_token_a_sample(step, node, site) for node in final[:2])
    row_held = tuple(
        _one_token_a_sample(step, step.emit(dispatch.take_rows, node, row, name=f"{node.name}_rows"), site)
        for node in held
    )
    row_threshold = step.emit(rows.gather_samples, threshold, row, site.tokens, 0, name=f"{base}_threshold_rows")
    row_slot, row_slot_expert, row_slot_weight, row_code = _decide(
        step, base, row_expert, row_weight, row_held, row_threshold
    )
    now = step.emit(slots.refreshed_weight, row_code, row_slot_weight, row_held[1], name=f"{base}_weight_now_rows")
    step.write(f"{site.path}.weight", row, _without_token(step, now))
    held_expert = step.emit(
        rows.write_rows, slot_expert, row, _without_token(step, row_slot_expert), name=f"new_{base}_expert"
    )
    step.updated[f"{site.path}.expert"] = held_expert
    weight_rows = step.emit(branch.to_slots, row_weight, row_slot, name=f"{base}_weight_by_slot_rows")
    provisional_by_slot = step.emit(branch.to_slots, weight, slot, name=f"{base}_provisional_weight_by_slot")
    by_slot = step.emit(
        rows.write_rows, provisional_by_slot, row, _without_token(step, weight_rows), name=f"{base}_weight_by_slot"
    )
    final_expert = step.emit(
        rows.write_rows, expert, row, _without_token(step, row_expert), name=f"{base}_final_expert"
    )
    _store_activation(step, site, final_expert)
    return Decision(row, row_code, row_slot_expert, final[2], final_expert, by_slot)


def _one_token_a_sample(step: StepBuilder, node: fx.Node, site: MoESite) -> fx.Node:
    """Rows [M, k] as M samples of one token, [M, 1, k], so that the same decision applies."""
    return step.emit(slots.slots, node, 1, site.top_k, name=f"{node.name}_slots")


def _without_token(step: StepBuilder, node: fx.Node) -> fx.Node:
    """[M, 1, k] -> [M, k]."""
    return step.emit(rows.rows_first, node, 0, 1, name=f"{node.name}_flat")


def _by_slot_shape(step: StepBuilder, site: MoESite, node: fx.Node) -> fx.Node:
    return step.emit(slots.slots, node, site.tokens, site.top_k, name=f"{node.name}_slots")


def _provisional_routing(step: StepBuilder, site: MoESite, attention: AttentionSite) -> tuple[fx.Node, fx.Node]:
    """Router on the token state that the cached attention gives: a copy of the nodes in between."""
    output, expert, weight = (step.nodes[name] for name in (attention.output, site.expert, site.weight))
    replace = {output: step.cache[f"{attention.path}.attn"]}
    copies = clone_nodes(step.graph, between([output], [expert, weight]), replace, "provisional")
    return _by_slot_shape(step, site, copies[expert]), _by_slot_shape(step, site, copies[weight])


def _threshold(step: StepBuilder, site: MoESite, expert: fx.Node) -> fx.Node:
    base, policy = site.path.replace(".", "_"), step.policy
    before = step.cache[f"{site.path}.activation"]
    activation = step.emit(branch.update_activation, before, expert, policy.beta, name=f"{base}_activation")
    options = (policy.tau0, policy.alpha, policy.entropy_norm)
    return step.emit(branch.expert_threshold, activation, *options, name=f"{base}_threshold")


def _held(step: StepBuilder, site: MoESite) -> tuple[fx.Node, ...]:
    return tuple(step.cache[f"{site.path}.{kind}"] for kind in ("expert", "weight", "norm"))


def _decide(
    step: StepBuilder, name: str, expert: fx.Node, weight: fx.Node, held: tuple[fx.Node, ...], threshold: fx.Node
) -> tuple[fx.Node, ...]:
    policy = step.policy
    options = (policy.lambda1, policy.lambda2, policy.score_weight)
    decision = step.emit(branch.decide, expert, weight, *held, threshold, *options, name=f"{name}_decision")
    return step.unpack(decision, *(f"{name}_{part}" for part in ("slot", "slot_expert", "slot_weight", "code")))


def _store_activation(step: StepBuilder, site: MoESite, expert: fx.Node) -> None:
    state = f"{site.path}.activation"
    name = "new_" + state.replace(".", "_")
    step.updated[state] = step.emit(branch.update_activation, step.cache[state], expert, step.policy.beta, name=name)


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
    feature = step.write(f"{site.path}.feature", picked, hidden)
    norm = step.emit(dispatch.feature_norm, hidden, name=f"{base}_hidden_norm")
    step.write(f"{site.path}.norm", picked, norm)
    combined = step.emit(dispatch.combine_slots, feature, decision.weight, name=f"{base}_combined")
    axes = programs.x_axes
    result = step.emit(rows.tokens_back, combined, axes.batch, axes.token, name=f"{base}_routed")
    step.nodes[site.experts].replace_all_uses_with(result)


def _run_shared(step: StepBuilder, site: MoESite, decision: Decision, programs: MoEPrograms) -> None:
    """The shared expert of tokens with a recomputed branch (point 6)."""
    if programs.shared is None or programs.shared_axes is None:
        return
    base, state = site.path.replace(".", "_"), f"{site.path}.shared"
    if step.policy.shared_expert == "reuse":
        step.updated[state] = step.cache[state]
    else:
        mask = step.emit(slots.token_mask, decision.code, name=f"{base}_shared_mask")
        chosen = step.emit(rows.select_rows, mask, name=f"{base}_shared_local")
        row = chosen
        if decision.row is not None:
            row = step.emit(rows.rows_of_rows, decision.row, chosen, name=f"{base}_shared_row")
        inputs = step.emit(dispatch.take_rows, decision.x, chosen, name=f"{base}_shared_x")
        given = {step.nodes[site.shared_root or ""]: inputs}
        names, counter = (f"{base}_shared_output",), Counter(site.path, "shared_rows")
        (fresh,) = step.run_program(programs.shared, row, f"{base}_shared_rows", names, counter, given)
        step.write(state, row, fresh)
        step.count(site.path, "shared_rows", slots.count_rows, row)
    axes = programs.shared_axes
    dense = step.emit(rows.tokens_back, step.updated[state], axes.batch, axes.token, name=f"{base}_shared")
    step.nodes[site.shared or ""].replace_all_uses_with(dense)
