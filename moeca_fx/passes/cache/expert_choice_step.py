"""A MoE site whose experts chose their tokens, on a cached step: slots of an expert are matched by token.

token, w = router(x)                   -->  code    = decide_tokens(token, w, caches, threshold)            [B, E, C]
y        = experts(x, token, w)             feature = write_rows(cache_feature, branch, experts(x[slot_token[branch]]))
                                            y       = combine_chosen_slots(feature, slot_token, w by slot)

The model's own router runs on all tokens (method section 5). Attention before it is never synchronized: an expert's
choice depends on every token. What the site refreshed, as later rows inherit it, is every token with a recomputed
branch.
"""

from dataclasses import dataclass

from torch import fx

from moeca_fx.graph.sites import AttentionSite, MoESite
from moeca_fx.graph.state import SCALES_WITH, Counter
from moeca_fx.ops import chosen, dispatch, forecast, rows, slots
from moeca_fx.passes.cache.attention_step import AttentionPrograms
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.moe_full import score_weight_of
from moeca_fx.passes.cache.moe_history import correct_features
from moeca_fx.passes.cache.moe_programs import MoEPrograms, run_shared
from moeca_fx.policies import branch, expert_choice
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import BranchPicker, ScoreThreshold

_Held = dict[str, fx.Node]  # caches of the slots by kind: token, weight, norm where it is kept


@dataclass(frozen=True)
class _Decision:
    """What was decided, each [B, E, C] in slot order: codes, tokens, current routing weights."""

    code: fx.Node
    token: fx.Node
    weight: fx.Node


def rewrite_chosen(
    step: StepBuilder,
    site: MoESite,
    programs: MoEPrograms,
    rule: BranchRule,
    attention: tuple[AttentionSite, AttentionPrograms] | None,
) -> None:
    """Rewrite the site; `attention` is None, as it is with every such site."""
    assert attention is None, f"{site.path}: attention cannot be synchronized with expert choice"
    x, base = step.nodes[site.x], site.path.replace(".", "_")
    decision = _decide(step, site, rule)
    mask = step.emit(chosen.chosen_mask, decision.code, decision.token, site.tokens, name=f"{base}_refresh")
    step.refreshed[site.path] = mask
    feature = _run_experts(step, site, decision, x)
    arguments = (feature, decision.token, decision.weight, site.tokens)
    combined = step.emit(chosen.combine_chosen_slots, *arguments, name=f"{base}_combined")
    axes = programs.x_axes
    result = step.emit(rows.tokens_back, combined, axes.batch, axes.token, name=f"{base}_routed")
    step.replace(step.nodes[site.experts], result)
    if programs.shared is not None:
        run_shared(step, site, rule, x, mask, programs)
    step.count(site.path, "matched", slots.count_matched, decision.code, decision.code)
    step.count(site.path, "recomputed", slots.count_recomputed, decision.code)


def _decide(step: StepBuilder, site: MoESite, rule: BranchRule) -> _Decision:
    """Match, score and update the slots; the weights of what is reused stay those its feature was computed with."""
    path, base = site.path, site.path.replace(".", "_")
    token, weight = (
        step.emit(slots.slots, step.nodes[name], *site.slots, name=f"{base}_{kind}_now")
        for kind, name in (("token", site.expert), ("weight", site.weight))
    )
    kinds = [kind for kind in ("token", "weight", "norm") if f"{path}.{kind}" in step.cache]
    held = {kind: step.cache[f"{path}.{kind}"] for kind in kinds}
    if isinstance(rule.selector, ScoreThreshold):
        decided = _by_threshold(step, site, rule.selector, token, weight, held)
    else:
        assert isinstance(rule.selector, BranchPicker), f"{rule.selector!r}: a selector is one of these"
        picked = _pick(step, site, rule.selector, token, weight, held)
        arguments = (token, weight, held["token"], picked, site.tokens, score_weight_of(rule))
        decided = step.emit(expert_choice.decide_picked_tokens, *arguments, name=f"{base}_decision")
    parts = ("slot", "slot_token", "slot_weight", "code")
    slot, slot_token, slot_weight, code = step.unpack(decided, *(f"{base}_{part}" for part in parts))
    step.updated[f"{path}.token"] = slot_token
    step.updated[f"{path}.weight"] = step.emit(
        slots.refreshed_weight, code, slot_weight, held["weight"], name=f"new_{base}_weight"
    )
    return _Decision(code, slot_token, step.emit(branch.to_slots, weight, slot, name=f"{base}_weight_by_slot"))


def _by_threshold(
    step: StepBuilder,
    site: MoESite,
    selector: ScoreThreshold,
    token: fx.Node,
    weight: fx.Node,
    held: _Held,
) -> fx.Node:
    base, state = site.path.replace(".", "_"), f"{site.path}.activation"
    updating = (step.cache[state], token, selector.beta)
    activation = step.emit(expert_choice.update_chosen, *updating, name=f"new_{base}_activation")
    step.updated[state] = activation
    options = (selector.tau0, selector.alpha, selector.entropy_norm)
    threshold = step.emit(branch.expert_threshold, activation, *options, name=f"{base}_threshold")
    scoring = (site.tokens, selector.lambda1, selector.lambda2, selector.score_weight)
    arguments = (token, weight, *held.values(), threshold, *scoring)
    return step.emit(expert_choice.decide_tokens, *arguments, name=f"{base}_decision")


def _pick(
    step: StepBuilder, site: MoESite, selector: BranchPicker, token: fx.Node, weight: fx.Node, held: _Held
) -> fx.Node:
    base, signals = site.path.replace(".", "_"), {"expert": held["token"]}
    if "score" in selector.signals:
        scoring = (site.tokens, selector.lambda1, selector.lambda2, selector.score_weight)
        arguments = (token, weight, *held.values(), *scoring)
        signals["score"] = step.emit(expert_choice.rank_tokens_by_score, *arguments, name=f"{base}_rank")
    if "error" in selector.signals:
        signals["error"] = step.cache[f"{site.path}.error"]
    arguments = (*(signals[kind] for kind in selector.signals), *selector.arguments())
    return step.emit(selector.function, *arguments, name=f"{base}_picked")


def _run_experts(step: StepBuilder, site: MoESite, decision: _Decision, x: fx.Node) -> fx.Node:
    """Run the picked branches on the tokens of their slots; the features of all slots [B, E, C, H]."""
    base = site.path.replace(".", "_")
    owner = step.emit(chosen.owners, decision.token, name=f"{base}_owner")
    plan = step.emit(dispatch.plan_recomputed, decision.code, owner, None, site.num_experts, name=f"{base}_plan")
    names = tuple(f"{base}_{part}" for part in ("branch", "local", "row_expert", "offsets"))
    picked, local, row_expert, offsets = step.unpack(plan, *names)
    source = step.emit(chosen.source_rows, decision.token, picked, site.tokens, name=f"{base}_source")
    inputs = step.emit(dispatch.take_rows, x, source, name=f"{base}_rows")
    program = f"{base}_experts"
    hidden = step.graph.create_node("call_module", program, (inputs, row_expert, offsets), name=f"{base}_hidden")
    hidden.meta[SCALES_WITH] = Counter(site.path, "recomputed")
    if f"{site.path}.norm" in step.cache:
        norm = step.emit(dispatch.feature_norm, hidden, name=f"{base}_hidden_norm")
        step.write(f"{site.path}.norm", picked, norm)
    if step.terms == 1:
        return step.write(f"{site.path}.feature", picked, hidden)
    features = correct_features(step, site, decision.code, picked, local, hidden)
    assert step.clock is not None, f"{site.path}: a forecast reads the clock"
    return step.emit(forecast.forecast, step.clock, *features, name=f"{base}_forecast")
