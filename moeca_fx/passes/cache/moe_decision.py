"""Which branches a cached step recomputes (method sections 2 and 4).

Without synchronized attention there is one routing, of all tokens. With it, a provisional routing on the cached
attention picks the tokens to refresh; only those are routed again after their attention was recomputed:

    expert', w' = router(x + gate * cache_attn)                        all tokens, a copy of the model's own nodes
    mask        = token_mask(decide(expert', w', caches, threshold))
    expert, w, x = routing_rows(row, fresh attention rows)             refreshed tokens only
    code        = decide(expert, w, cached rows, threshold)
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from moeca_fx.graph.rewrite import clone_nodes, likened
from moeca_fx.graph.row_program import RowProgram
from moeca_fx.graph.sites import AttentionSite, MoESite
from moeca_fx.graph.slicing import between
from moeca_fx.graph.state import Counter
from moeca_fx.ops import dispatch, rows, slots
from moeca_fx.passes.cache.attention_step import AttentionPrograms, refresh_attention
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.moe_full import score_weight_of
from moeca_fx.policies import branch, empty_slots
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import BranchPicker, BranchSignal, ScoreThreshold


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


@dataclass(frozen=True)
class _Maths:
    """The tensor functions of a decision; where slots may be empty, E is their last argument."""

    decide: Callable[..., object]
    decide_picked: Callable[..., object]
    rank_by_score: Callable[..., object]
    update_activation: Callable[..., object]


_MATHS = {
    "token": _Maths(branch.decide, branch.decide_picked, branch.rank_by_score, branch.update_activation),
    "empty": _Maths(
        empty_slots.decide, empty_slots.decide_picked, empty_slots.rank_by_score, empty_slots.update_activation
    ),
}


def _counted(site: MoESite) -> tuple[int, ...]:
    """The last argument of `_Maths`, if any."""
    return (site.num_experts,) if site.empty_slots else ()


@dataclass(frozen=True)
class _Criterion:
    """What picks matched branches: per-expert thresholds [B, E], or slots picked beforehand [B, T, k]."""

    threshold: fx.Node | None
    picked: fx.Node | None


def decide_all(step: StepBuilder, site: MoESite, rule: BranchRule) -> Decision:
    """One routing of all tokens."""
    base = site.path.replace(".", "_")
    expert, weight = (
        _by_slot_shape(step, site, step.nodes[site.expert]),
        _by_slot_shape(step, site, step.nodes[site.weight]),
    )
    criterion = _criterion(step, site, rule, expert, weight)
    held = _held(step, site)
    slot, slot_expert, slot_weight, code = _decide(step, site, rule, base, expert, weight, held, criterion)
    step.refreshed[site.path] = step.emit(slots.token_mask, code, name=f"{base}_refresh")
    step.updated[f"{site.path}.expert"] = slot_expert
    step.updated[f"{site.path}.weight"] = step.emit(
        slots.refreshed_weight, code, slot_weight, held["weight"], name=f"new_{base}_weight"
    )
    by_slot = step.emit(branch.to_slots, weight, slot, name=f"{base}_weight_by_slot")
    _store_activation(step, site, rule, expert)
    return Decision(None, code, slot_expert, step.nodes[site.x], expert, by_slot)


def decide_synchronized(
    step: StepBuilder,
    site: MoESite,
    rule: BranchRule,
    routing: RowProgram,
    attention: AttentionSite,
    attention_programs: AttentionPrograms,
) -> Decision:
    """Provisional routing of all tokens, attention of the refreshed ones, final routing of those (points a to d)."""
    base = site.path.replace(".", "_")
    output = step.nodes[attention.output]
    expert, weight = _provisional_routing(step, site, attention)
    criterion = _criterion(step, site, rule, expert, weight)
    held = _held(step, site)
    slot, slot_expert, _, code = _decide(step, site, rule, f"{base}_provisional", expert, weight, held, criterion)
    mask = step.refreshed[site.path] = step.emit(slots.token_mask, code, name=f"{base}_refresh")
    row, fresh, attended = refresh_attention(step, attention, mask, attention_programs)
    step.replace(output, attended)

    names = tuple(f"{base}_{part}_rows" for part in ("expert", "weight", "x"))
    counter = Counter(attention.path, "attention_rows")
    final = step.run_program(routing, row, f"{base}_routing_rows", names, counter, {output: fresh})
    row_expert, row_weight = (_one_token_a_sample(step, node, site) for node in final[:2])
    row_held = {kind: _rows_of(step, site, node, row) for kind, node in held.items()}
    row_criterion = _criterion_of_rows(step, site, criterion, row)
    row_slot, row_slot_expert, row_slot_weight, row_code = _decide(
        step, site, rule, base, row_expert, row_weight, row_held, row_criterion
    )
    now = step.emit(
        slots.refreshed_weight, row_code, row_slot_weight, row_held["weight"], name=f"{base}_weight_now_rows"
    )
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
    _store_activation(step, site, rule, final_expert)
    return Decision(row, row_code, row_slot_expert, final[2], final_expert, by_slot)


def _rows_of(step: StepBuilder, site: MoESite, node: fx.Node, row: fx.Node) -> fx.Node:
    """Rows of a [B, T, k] node as [M, 1, k]."""
    return _one_token_a_sample(step, step.emit(dispatch.take_rows, node, row, name=f"{node.name}_rows"), site)


def _criterion_of_rows(step: StepBuilder, site: MoESite, criterion: _Criterion, row: fx.Node) -> _Criterion:
    """The same thresholds, or the same picked slots, for some rows."""
    base = site.path.replace(".", "_")
    if criterion.threshold is not None:
        arguments = (criterion.threshold, row, site.tokens, 0)
        return _Criterion(step.emit(rows.gather_samples, *arguments, name=f"{base}_threshold_rows"), None)
    assert criterion.picked is not None
    return _Criterion(None, _rows_of(step, site, criterion.picked, row))


def _one_token_a_sample(step: StepBuilder, node: fx.Node, site: MoESite) -> fx.Node:
    """Rows [M, k] as M samples of one token, [M, 1, k], so that the same decision applies."""
    return step.emit(slots.slots, node, 1, site.top_k, name=f"{node.name}_slots")


def _without_token(step: StepBuilder, node: fx.Node) -> fx.Node:
    """[M, 1, k] -> [M, k]."""
    return step.emit(rows.rows_first, node, 0, 1, name=f"{node.name}_flat")


def _by_slot_shape(step: StepBuilder, site: MoESite, node: fx.Node) -> fx.Node:
    return step.emit(slots.slots, node, site.tokens, site.top_k, name=f"{node.name}_slots")


def _provisional_routing(step: StepBuilder, site: MoESite, attention: AttentionSite) -> tuple[fx.Node, fx.Node]:
    """Router on the token state that the reused attention gives: a copy of the nodes in between."""
    output, expert, weight = (step.nodes[name] for name in (attention.output, site.expert, site.weight))
    replace = {output: likened(step.reused(f"{attention.path}.attn"), output)}
    copies = clone_nodes(step.graph, between([output], [expert, weight]), replace, "provisional")
    return _by_slot_shape(step, site, copies[expert]), _by_slot_shape(step, site, copies[weight])


def _criterion(step: StepBuilder, site: MoESite, rule: BranchRule, expert: fx.Node, weight: fx.Node) -> _Criterion:
    base, selector = site.path.replace(".", "_"), rule.selector
    if isinstance(selector, ScoreThreshold):
        before = step.cache[f"{site.path}.activation"]
        updating = (before, expert, selector.beta, *_counted(site))
        activation = step.emit(_MATHS[site.form].update_activation, *updating, name=f"{base}_activation")
        options = (selector.tau0, selector.alpha, selector.entropy_norm)
        return _Criterion(step.emit(branch.expert_threshold, activation, *options, name=f"{base}_threshold"), None)
    assert isinstance(selector, BranchPicker), f"{selector!r}: expected ScoreThreshold or a BranchPicker"
    signals = [_signal(step, site, selector, kind, expert, weight) for kind in selector.signals]
    return _Criterion(None, step.emit(selector.function, *signals, *selector.arguments(), name=f"{base}_picked"))


def _signal(
    step: StepBuilder, site: MoESite, selector: BranchPicker, kind: BranchSignal, expert: fx.Node, weight: fx.Node
) -> fx.Node:
    if kind != "score":
        return step.cache[f"{site.path}.{kind}"]
    options = (selector.lambda1, selector.lambda2, selector.score_weight, *_counted(site))
    name = f"{site.path}_rank".replace(".", "_")
    return step.emit(_MATHS[site.form].rank_by_score, expert, weight, *_held(step, site).values(), *options, name=name)


def _held(step: StepBuilder, site: MoESite) -> dict[str, fx.Node]:
    kinds = ("expert", "weight", "norm")
    return {kind: step.cache[f"{site.path}.{kind}"] for kind in kinds if f"{site.path}.{kind}" in step.cache}


def _decide(
    step: StepBuilder,
    site: MoESite,
    rule: BranchRule,
    name: str,
    expert: fx.Node,
    weight: fx.Node,
    held: dict[str, fx.Node],
    criterion: _Criterion,
) -> tuple[fx.Node, ...]:
    if criterion.threshold is not None:
        selector = rule.selector
        assert isinstance(selector, ScoreThreshold)
        options = (selector.lambda1, selector.lambda2, selector.score_weight)
        held_and_limit = (*held.values(), criterion.threshold)
        operands = (expert, weight, *held_and_limit)
        decision = step.emit(_MATHS[site.form].decide, *operands, *options, *_counted(site), name=f"{name}_decision")
    else:
        kept = (held["expert"], held["weight"], criterion.picked)
        picking = (score_weight_of(rule), rule.margin, *_counted(site))
        decision = step.emit(_MATHS[site.form].decide_picked, expert, weight, *kept, *picking, name=f"{name}_decision")
    *parts, code = step.unpack(decision, *(f"{name}_{part}" for part in ("slot", "slot_expert", "slot_weight", "code")))
    return (*parts, step.forced(code))


def _store_activation(step: StepBuilder, site: MoESite, rule: BranchRule, expert: fx.Node) -> None:
    if isinstance(rule.selector, ScoreThreshold):
        state = f"{site.path}.activation"
        name, before = "new_" + state.replace(".", "_"), step.cache[state]
        updating = (before, expert, rule.selector.beta, *_counted(site))
        step.updated[state] = step.emit(_MATHS[site.form].update_activation, *updating, name=name)
