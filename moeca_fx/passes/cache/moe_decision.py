"""Which branches a cached step recomputes (method sections 2 and 4).

Without synchronized attention there is one routing, of all tokens. With it, a provisional routing on the cached
attention picks the tokens to refresh; only those are routed again after their attention was recomputed:

    expert', w' = router(x + gate * cache_attn)                        all tokens, a copy of the model's own nodes
    mask        = token_mask(decide(expert', w', caches, threshold))
    expert, w, x = routing_rows(row, fresh attention rows)             refreshed tokens only
    code        = decide(expert, w, cached rows, threshold)
"""

from dataclasses import dataclass

from torch import fx

from moeca_fx.graph.rewrite import clone_nodes
from moeca_fx.graph.row_program import RowProgram
from moeca_fx.graph.sites import AttentionSite, MoESite
from moeca_fx.graph.slicing import between
from moeca_fx.graph.state import Counter
from moeca_fx.ops import dispatch, rows, slots
from moeca_fx.passes.cache.attention_step import AttentionPrograms, refresh_attention
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.policies import branch


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


def decide_all(step: StepBuilder, site: MoESite) -> Decision:
    """One routing of all tokens."""
    base = site.path.replace(".", "_")
    expert, weight = (
        _by_slot_shape(step, site, step.nodes[site.expert]),
        _by_slot_shape(step, site, step.nodes[site.weight]),
    )
    threshold = _threshold(step, site, expert)
    held = _held(step, site)
    slot, slot_expert, slot_weight, code = _decide(step, f"{base}", expert, weight, held, threshold)
    step.refreshed[site.path] = step.emit(slots.token_mask, code, name=f"{base}_refresh")
    step.updated[f"{site.path}.expert"] = slot_expert
    then = held[1]
    step.updated[f"{site.path}.weight"] = step.emit(
        slots.refreshed_weight, code, slot_weight, then, name=f"new_{base}_weight"
    )
    by_slot = step.emit(branch.to_slots, weight, slot, name=f"{base}_weight_by_slot")
    _store_activation(step, site, expert)
    return Decision(None, code, slot_expert, step.nodes[site.x], expert, by_slot)


def decide_synchronized(
    step: StepBuilder,
    site: MoESite,
    routing: RowProgram,
    attention: AttentionSite,
    attention_programs: AttentionPrograms,
) -> Decision:
    """Provisional routing of all tokens, attention of the refreshed ones, final routing of those (points a to d)."""
    base = site.path.replace(".", "_")
    output = step.nodes[attention.output]
    expert, weight = _provisional_routing(step, site, attention)
    threshold = _threshold(step, site, expert)
    held = _held(step, site)
    slot, slot_expert, _, code = _decide(step, f"{base}_provisional", expert, weight, held, threshold)
    mask = step.refreshed[site.path] = step.emit(slots.token_mask, code, name=f"{base}_refresh")
    row, fresh = refresh_attention(step, attention, mask, attention_programs)
    output.replace_all_uses_with(step.updated[f"{attention.path}.attn"])

    names = tuple(f"{base}_{part}_rows" for part in ("expert", "weight", "x"))
    counter = Counter(attention.path, "attention_rows")
    final = step.run_program(routing, row, f"{base}_routing_rows", names, counter, {output: fresh})
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
