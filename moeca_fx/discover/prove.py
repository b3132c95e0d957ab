"""Prove what a candidate computes: ``sum_k weight_k * expert_k(x)``, in a method of its own or inside of a block.

A method ``(x, ids, weights)`` between router and experts is taken when there is one: it is proven alone, and the rest
of the model is traced as it is (`method`). Otherwise the modules around the experts are tried from the inside out,
router and dispatch together (`inline`).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from moeca_fx.autocast import Autocast
from moeca_fx.discover.calls import crowded
from moeca_fx.discover.candidates import Candidate
from moeca_fx.discover.experts import as_expert
from moeca_fx.discover.inline.holders import prove_modules, prove_stacked
from moeca_fx.discover.inline.nearest import Nearest
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.inline.words import match_in_words
from moeca_fx.discover.journal import Attempt, Journal
from moeca_fx.discover.method import MethodCall, Spied, TracedMethod, prove_method, spied
from moeca_fx.discover.probe import Probe, enclosing, enclosing_router, innermost_method, key_of, run_again
from moeca_fx.discover.records import MoERegion, Refusal
from moeca_fx.discover.scales import OffScale
from moeca_fx.reasons import Reason

_LEVELS = 3  # modules around the experts that are tried as the block


def prove(
    model: nn.Module,
    candidates: list[Candidate],
    run: Probe,
    journal: Journal,
) -> tuple[list[MoERegion], list[Refusal]]:
    """Run the model a second time, and prove or refuse every candidate.

    Args:
        model: in eval mode.
        candidates: in module order.
        run: what the first run told.
        journal: gets every attempt.
    """
    methods = {key_of(c): _method_of(c, run) for c in candidates if _refused_at_once(c, run) is None}
    seen: Spied = {}
    with ExitStack() as stack:
        for method in methods.values():
            if isinstance(method, TracedMethod) and (method.owner, method.name) not in seen:
                calls = seen[method.owner, method.name] = []
                stack.enter_context(spied(model.get_submodule(method.owner), method.name, calls))
        if methods:
            with journal.stage("second run"):
                run_again(model, run, seen.values())
    results = []
    for candidate in candidates:
        refused = _refused_at_once(candidate, run)
        results.append(refused or _prove(model, candidate, run, methods[key_of(candidate)], seen, journal))
    proven = [result for result in results if isinstance(result, MoERegion)]
    return proven, [result for result in results if isinstance(result, Refusal)]


def _refused_at_once(candidate: Candidate, run: Probe) -> Refusal | None:
    if candidate.nested:
        problem = "a list of blocks: it contains another candidate"
        return Refusal(candidate.path, problem, False, (Reason.LIST_OF_BLOCKS,))
    calls = run.experts[key_of(candidate)]
    if not candidate.stacked and calls.count < 2:
        routed = enclosing_router(candidate.path, run.topk) is not None
        routed = routed and (not candidate.attributes or (calls.count > 0 and candidate.count > 2))
        problem = f"only {calls.count} of {candidate.count} experts ran in the probe run"
        return Refusal(candidate.path, problem, routed, (Reason.EXPERTS_DID_NOT_RUN,))
    if others := calls.autocasts - {Autocast.now()}:
        routed = enclosing_router(candidate.path, run.topk) is not None and not calls.on_every_token
        own = ", ".join(sorted(map(str, others)))
        problem = (
            f"its experts run under autocast {own}, which the model enters itself, and {Autocast.now()} around the "
            "model; let the caller enter it, around transform and calls"
        )
        return Refusal(candidate.path, problem, routed, (Reason.AUTOCAST,))
    return None


def _method_of(candidate: Candidate, run: Probe) -> TracedMethod | str:
    """The method that dispatches with ids and weights as its arguments, or why there is none."""
    block = enclosing_router(candidate.path, run.topk)
    if block is None:
        return "no router: no top-k ran in an enclosing module during the probe run"
    if candidate.stacked:
        return "its experts are stacked parameters"
    if not all(next(expert.parameters(), None) is not None for _, expert in candidate.experts):
        return "some of its experts have no parameters"
    calls = run.experts[key_of(candidate)]
    region = innermost_method(calls.common, run.paths)
    if region is None:
        return "no method of the model is common to all expert calls"
    owner, name = region
    if any(stack and stack[-1] == owner and owner == block for stack in run.topk):
        return f"the router runs inside the dispatching method {owner}.{name}"
    return TracedMethod(owner, name)


def _prove(
    model: nn.Module, candidate: Candidate, run: Probe, method: TracedMethod | str, seen: Spied, journal: Journal
) -> MoERegion | Refusal:
    block = enclosing_router(candidate.path, run.topk)
    calls = run.experts[key_of(candidate)]
    reasons: list[str] = []
    codes: list[Reason] = []
    if isinstance(method, TracedMethod):
        assert block is not None, f"{candidate.path}: a method is looked for under a router only"
        proof = partial(_by_method, model, candidate, run, method, block, seen[method.owner, method.name])
        try:
            return journal.attempt(candidate.path, "method", f"{method.owner}.{method.name}", proof)
        except OffScale as reason:
            return Refusal(candidate.path, f"{method.owner}.{method.name}: {reason}", True, (reason.code,))
        except NotReplayable as reason:
            reasons.append(f"{method.owner}.{method.name}: {reason}")
            codes.append(reason.code)
    else:
        reasons.append(method)
        journal.attempts.append(Attempt(candidate.path, "method", "not tried", 0.0, problem=method))
        codes += [Reason.NO_ROUTER] if block is None else []
    try:
        return _by_block(model, candidate, run, journal)
    except NotReplayable as reason:
        reasons.append(str(reason))
        codes.append(reason.code)
    routed = block is not None and not candidate.attributes and not calls.on_every_token
    if calls.on_every_token:
        reasons.append("each of them runs on every token")
        codes.append(Reason.EVERY_TOKEN)
    return Refusal(candidate.path, "; ".join(reasons), routed, tuple(dict.fromkeys(codes)))


def _keyword(candidate: Candidate, run: Probe) -> str | None:
    names = run.experts[key_of(candidate)].keywords
    return next(iter(names)) if len(names) == 1 and "" not in names else None


def _by_method(
    model: nn.Module,
    candidate: Candidate,
    run: Probe,
    method: TracedMethod,
    block: str,
    calls: Sequence[MethodCall],
    _nearest: Nearest | None,
) -> tuple[MoERegion, str]:
    keyword = _keyword(candidate, run)
    experts = [as_expert(expert, keyword) for _, expert in candidate.experts]
    bound = getattr(model.get_submodule(method.owner), method.name)
    roles = prove_method(experts, calls, _crowded_calls(model, run, method, block), bound)
    region = MoERegion(
        path=method.owner,
        method=method.name,
        block=block,
        experts=tuple(path for path, _ in candidate.experts),
        top_k=roles.top_k,
        x=roles.x,
        expert=roles.expert,
        weight=roles.weight,
        error=roles.error,
        container=candidate.path,
        keyword=keyword,
        layout=roles.layout,
        empty_slots=roles.empty_slots,
    )
    return region, f"rows: {roles.x}, ids: {roles.expert}, weights: {roles.weight}"


def _crowded_calls(model: nn.Module, run: Probe, method: TracedMethod, block: str) -> list[MethodCall]:
    """Calls of the method when all tokens of its block's call are nearly the same."""
    calls: list[MethodCall] = []
    for call in run.small.get(block, [])[:1]:
        more = crowded(call)
        eager = torch.compiler.set_stance("force_eager")
        with spied(model.get_submodule(method.owner), method.name, calls), eager:
            model.get_submodule(block).forward(*more.args, **more.kwargs)
    return calls


def _by_block(model: nn.Module, candidate: Candidate, run: Probe, journal: Journal) -> MoERegion:
    """Try the modules around the experts, innermost first.

    Raises:
        NotReplayable: with the reason of each.
    """
    reasons: dict[str, list[str]] = {}
    codes: list[Reason] = []
    for path in [path for path in enclosing(candidate) if path][:_LEVELS]:
        if not run.small.get(path):
            continue
        try:
            proof = partial(_block_at, model, candidate, run, path)
            return journal.attempt(candidate.path, "block", f"{path}.forward", proof)
        except OffScale as reason:  # what lies further out holds the same sum
            raise OffScale(f"{path}.forward: {reason}") from reason
        except NotReplayable as reason:
            reasons.setdefault(str(reason), []).append(f"{path}.forward")
            codes.append(reason.code)
    said = "; ".join(f"{', '.join(paths)}: {reason}" for reason, paths in reasons.items())
    problem = said or "no module around the experts was called"
    raise NotReplayable(problem, Reason.most_telling(codes) or Reason.NO_DISPATCH)


def _block_at(
    model: nn.Module, candidate: Candidate, run: Probe, path: str, nearest: Nearest | None
) -> tuple[MoERegion, str]:
    if run.why_no_large:
        raise NotReplayable(run.why_no_large, Reason.ONE_BATCH_SIZE)
    if len(run.small[path]) != 1 or len(run.large[path]) != 1:
        problem = f"called {len(run.small[path])} times in one forward; exactly one call is supported"
        raise NotReplayable(problem, Reason.CALLED_AGAIN)
    calls = (run.small[path][0], run.large[path][0])
    keyword = _keyword(candidate, run)
    if candidate.stacked:
        block, form = prove_stacked(model, candidate.path, candidate.stacked, path, *calls, nearest=nearest)
        experts = tuple(f"{candidate.path}.{index}" for index in range(candidate.stacked))
    else:
        names = [name for name, _ in candidate.experts]
        block, form = prove_modules(model, names, keyword, path, *calls, nearest=nearest), None
        experts = tuple(name for index, (name, _) in enumerate(candidate.experts) if index not in block.free)
    routing = block.match.routing
    region = MoERegion(
        path=path,
        method="forward",
        block=path,
        experts=experts,
        top_k=min(routing.slots, len(experts)) if routing.kind == "dense" else routing.slots,
        x="",
        expert="",
        weight="",
        error=block.error,
        inline=True,
        container=candidate.path,
        form=form,
        keyword=keyword,
        free=tuple((index, candidate.experts[index][0]) for index in block.free),
        layout="expert" if routing.kind == "choice" else "token",
        empty_slots=block.empty_slots,
        replay=block,
    )
    return region, match_in_words(block.match, block.recipe.sources, (*block.recipe.before, *block.recipe.after))
