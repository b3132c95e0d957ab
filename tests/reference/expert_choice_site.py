"""MoECa at one site whose experts choose their tokens, for one sample: plain loops over experts, slots and tokens.

What `moe_site` says of a token's k slots holds here for an expert's C slots, ids being tokens; a `Slot.expert` there is
the token here. Share and contribution stay what they are of a *token*: over all experts that chose it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import Budget, ScoreThreshold, Unmatched
from tests.reference import moe_site


@dataclass
class History:
    """A value at the last full steps, newest first; what stands for it now is their weighted sum."""

    values: list[Tensor]

    def guess(self, weights: Sequence[float]) -> Tensor:
        """The forecast."""
        total = weights[0] * self.values[0]
        for weight, value in zip(weights[1:], self.values[1:], strict=True):
            total = total + weight * value
        return total

    def refresh(self, fresh: Tensor, weights: Sequence[float]) -> None:
        """The value was computed anew: every kept value shifts by what the forecast missed."""
        missed = fresh - self.guess(weights)
        self.values = [value + missed for value in self.values]


@dataclass
class Slot:
    """One cached branch of an expert: the token, its weight and norm when computed, its features; what a forecast
    of it missed at the last full step."""

    token: int
    weight: float
    norm: float
    feature: History
    error: float = 0.0


@dataclass
class Site:
    """Everything cached at one site for one sample."""

    slots: list[list[Slot]] = field(default_factory=list)  # [E][C]
    activation: list[list[float]] = field(default_factory=list)  # [E][T]
    shared: list[History] = field(default_factory=list)  # [T]


Routing = tuple[list[list[int]], list[list[float]]]
"""Chosen tokens [E][C] and the router's weights [E][C]."""
Compute = Callable[[int, int], Tensor]
"""(expert, token) -> feature [H]."""


def norm_of(feature: Tensor) -> float:
    """The L2 norm of a feature [H]."""
    return math.sqrt(math.fsum(float(value) ** 2 for value in feature))


def values_of(routing: Routing, tokens: int, kind: str) -> list[list[float]]:
    """The weights as the score sees them: their share of the token's sum over all experts, or as they are."""
    chosen, weights = routing
    if kind == "raw":
        return [list(row) for row in weights]
    return _shares(chosen, weights, tokens)


def _shares(chosen: list[list[int]], values: list[list[float]], tokens: int) -> list[list[float]]:
    total = [0.0] * tokens
    for row, numbers in zip(chosen, values, strict=True):
        for token, value in zip(row, numbers, strict=True):
            total[token] += value
    return [
        [value / total[token] if total[token] else 0.0 for token, value in zip(row, numbers, strict=True)]
        for row, numbers in zip(chosen, values, strict=True)
    ]


def update_activation(site: Site, chosen: list[list[int]], tokens: int, beta: float) -> None:
    """Eq. 10; all zero before the first step."""
    before = site.activation or [[0.0] * tokens for _ in chosen]
    experts_of = [[e for e, row in enumerate(chosen) if i in row] for i in range(tokens)]
    site.activation = moe_site.update_activation(before, experts_of, beta)


def scores(site: Site, routing: Routing, tokens: int, rule: BranchRule) -> list[list[float | None]]:
    """The score of each branch (Eq. 9), None when its expert holds no slot with its token."""
    selector = rule.selector
    assert isinstance(selector, ScoreThreshold | Budget)
    values = values_of(routing, tokens, selector.score_weight)
    held = [[slot.token for slot in row] for row in site.slots]
    contributed = _shares(held, [[slot.norm for slot in row] for row in site.slots], tokens)
    found: list[list[float | None]] = []
    for e, row in enumerate(routing[0]):
        own: list[float | None] = []
        for p, q in enumerate(moe_site.match(row, held[e])):
            if q is None:
                own.append(None)
            else:
                then, part = site.slots[e][q].weight, contributed[e][q]
                own.append(moe_site.score(values[e][p], then, part, selector.lambda1, selector.lambda2))
        found.append(own)
    return found


def decide(site: Site, routing: Routing, tokens: int, rule: BranchRule) -> tuple[list[list[bool]], float]:
    """Which branches [E][C] are recomputed, and how far the decision is from a tie."""
    selector, margin = rule.selector, math.inf
    matched = [moe_site.match(row, [s.token for s in site.slots[e]]) for e, row in enumerate(routing[0])]
    if isinstance(selector, Unmatched):
        return [[q is None for q in row] for row in matched], margin
    if isinstance(selector, Budget):
        picked = _budget(site, routing, matched, tokens, rule)
        return [[q is None or (e, q) in picked for q in row] for e, row in enumerate(matched)], margin
    assert isinstance(selector, ScoreThreshold)
    tau = moe_site.thresholds(site.activation, selector.tau0, selector.alpha, selector.entropy_norm)
    found = scores(site, routing, tokens, rule)
    known = [abs(s - tau[e]) for e, row in enumerate(found) for s in row if s is not None]
    return [[s is None or s > tau[e] for s in row] for e, row in enumerate(found)], min(known, default=margin)


def _budget(
    site: Site, routing: Routing, matched: list[list[int | None]], tokens: int, rule: BranchRule
) -> set[tuple[int, int]]:
    """The best ranked slots (expert, slot) of the sample."""
    selector = rule.selector
    assert isinstance(selector, Budget)
    rank = {(e, q): slot.error for e, row in enumerate(site.slots) for q, slot in enumerate(row)}
    if selector.by == "score":
        rank = dict.fromkeys(rank, -math.inf)
        for e, row in enumerate(scores(site, routing, tokens, rule)):
            rank |= {(e, q): s for q, s in zip(matched[e], row, strict=True) if q is not None and s is not None}
    count = round(selector.share * len(rank))
    best = sorted(rank, key=lambda place: -rank[place])[:count]  # sorted() is stable: first come first
    return {place for place in best if rank[place] > -math.inf}


def fill(site: Site, routing: Routing, values: list[list[float]], compute: Compute, weights: Sequence[float]) -> None:
    """A full step: every slot anew, in the router's order; earlier features follow their (expert, token)."""
    before = {(e, slot.token): slot.feature for e, row in enumerate(site.slots) for slot in row}
    made = []
    for e, row in enumerate(routing[0]):
        own = []
        for p, token in enumerate(row):
            feature = compute(e, token)
            kept = before[e, token].values if (e, token) in before else [feature] * len(weights)
            error = norm_of(feature - History(kept).guess(weights)) * values[e][p]
            history = History([feature, *kept[: len(weights) - 1]])
            own.append(Slot(token, values[e][p], norm_of(feature), history, error))
        made.append(own)
    site.slots = made


def update(
    site: Site,
    routing: Routing,
    values: list[list[float]],
    recompute: list[list[bool]],
    compute: Compute,
    weights: Sequence[float],
) -> Tensor:
    """A cached step: the slots after it, and ``y`` [T, H], zero for tokens that nobody chose."""
    total: dict[int, Tensor] = {}
    for e, row in enumerate(routing[0]):
        places = moe_site.assign_slots(row, [slot.token for slot in site.slots[e]])
        for p, (token, q) in enumerate(zip(row, places, strict=True)):
            slot = site.slots[e][q]
            if recompute[e][p]:
                fresh = compute(e, token)
                if slot.token == token:
                    slot.feature.refresh(fresh, weights)
                else:
                    slot.feature = History([fresh] * len(weights))
                slot.token, slot.weight, slot.norm = token, values[e][p], norm_of(fresh)
            term = routing[1][e][p] * slot.feature.guess(weights)
            total[token] = total[token] + term if token in total else term
    zero = torch.zeros_like(next(iter(total.values())))
    return torch.stack([total.get(i, zero) for i in range(len(site.activation[0]))])
