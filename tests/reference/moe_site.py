"""MoECa at one mixture-of-experts site and for one sample: a few obvious lines for each rule of the method.

Equation numbers are those of arXiv 2606.15615. Scalars are Python floats, a feature is one tensor [H]; lists
run over tokens, slots or experts. A "slot" is one cached branch of a token, a "branch" one selected now.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Slot:
    """One cached branch of a token (Eq. 7): expert, weight when the feature was computed, feature."""

    expert: int
    weight: float
    feature: Tensor  # [H], before the routing weight


@dataclass
class SiteState:
    """Everything cached at one site for one sample."""

    slots: list[list[Slot]] = field(default_factory=list)  # [T][k]
    shared: list[Tensor] = field(default_factory=list)  # [T] of [H]; empty when the model has no shared expert
    activation: list[list[float]] = field(default_factory=list)  # [E][T]


def match(experts: Sequence[int], cached: Sequence[int]) -> list[int | None]:
    """q(p) of section 4.2: for every branch p the slot that holds the same expert, or None."""
    found: list[int | None] = []
    for expert in experts:
        slot = None
        for q, other in enumerate(cached):
            if other == expert:
                slot = q
        found.append(slot)
    return found


def share(weights: Sequence[float]) -> list[float]:
    """share(w)_p = w_p / sum_p w_p, so one threshold serves routers with any scale; 0 if the sum is 0."""
    total = math.fsum(weights)
    if total == 0.0:
        return [0.0 for _ in weights]
    return [weight / total for weight in weights]


def contribution(features: Sequence[Tensor]) -> list[float]:
    """o_q = ||h_q|| / sum_j ||h_j|| over the slots of one token (Eq. 9); 0 for all when every norm is 0."""
    norms = [math.sqrt(math.fsum(float(value) ** 2 for value in feature)) for feature in features]
    total = math.fsum(norms)
    if total == 0.0:
        return [0.0 for _ in norms]
    return [norm / total for norm in norms]


def score(now: float, then: float, contributed: float, lambda1: float, lambda2: float) -> float:
    """s = v + lambda1 * |v - v0| + lambda2 * o (Eq. 9)."""
    return now + lambda1 * abs(now - then) + lambda2 * contributed


def update_activation(
    activation: Sequence[Sequence[float]], experts: Sequence[Sequence[int]], beta: float
) -> list[list[float]]:
    """C_{e,i} <- beta * C_{e,i} + (1 - beta) * [e selected for token i] (Eq. 10); `experts` is [T][k]."""
    updated = []
    for e, row in enumerate(activation):
        updated.append([beta * old + (1.0 - beta) * float(e in experts[i]) for i, old in enumerate(row)])
    return updated


def entropy(row: Sequence[float]) -> float:
    """H = -sum_i P(i) log P(i) with P = C / sum C and 0 log 0 = 0 (Eq. 11); 0 if never selected."""
    total = math.fsum(row)
    if total == 0.0:
        return 0.0
    return -math.fsum(c / total * math.log(c / total) for c in row if c > 0.0)


def normalized_entropies(activation: Sequence[Sequence[float]], entropy_norm: str) -> list[float]:
    """Entropies mapped to [0, 1]: over the site's experts ("minmax"), or by the largest possible ("log").

    Both fall back to 0.5, the neutral value, when nothing can be told apart: all experts alike, one token.
    """
    entropies = [entropy(row) for row in activation]
    if entropy_norm == "minmax":
        low, high = min(entropies), max(entropies)
        if high - low <= 1e-12:  # equal up to the rounding of the logarithms
            return [0.5 for _ in entropies]
        return [(h - low) / (high - low) for h in entropies]
    if entropy_norm == "log":
        tokens = len(activation[0])
        if tokens == 1:
            return [0.5 for _ in entropies]
        return [h / math.log(tokens) for h in entropies]
    raise ValueError(f"entropy_norm: expected 'minmax' or 'log', found {entropy_norm!r}")


def thresholds(activation: Sequence[Sequence[float]], tau0: float, alpha: float, entropy_norm: str) -> list[float]:
    """tau_e = tau0 * (1 + alpha * (2 * Hn_e - 1)) (Eq. 12), one for each expert."""
    return [tau0 * (1.0 + alpha * (2.0 * h - 1.0)) for h in normalized_entropies(activation, entropy_norm)]


def score_values(weights: Sequence[float], score_weight: str) -> list[float]:
    """The weights as the score sees them: their share of the token's sum, or the router's own numbers."""
    if score_weight == "share":
        return share(weights)
    if score_weight == "raw":
        return list(weights)
    raise ValueError(f"score_weight: expected 'share' or 'raw', found {score_weight!r}")


def branch_scores(
    experts: Sequence[int], values: Sequence[float], slots: Sequence[Slot], lambda1: float, lambda2: float
) -> list[float | None]:
    """The score of each of a token's branches (Eq. 9), None when its expert is not in the cache.

    `values` are the branches' weights as the score sees them (`score_values`).
    """
    contributed = contribution([slot.feature for slot in slots])
    scores: list[float | None] = []
    for p, q in enumerate(match(experts, [slot.expert for slot in slots])):
        if q is None:
            scores.append(None)
        else:
            scores.append(score(values[p], slots[q].weight, contributed[q], lambda1, lambda2))
    return scores


def decide(experts: Sequence[int], scores: Sequence[float | None], tau: Sequence[float]) -> list[bool]:
    """The recomputation set R of one token (section 4.2): unmatched branches, and those with s > tau_e.

    `scores` are those of `branch_scores`, `tau` has one entry per expert.
    """
    return [s is None or s > tau[e] for e, s in zip(experts, scores, strict=True)]


def assign_slots(experts: Sequence[int], cached: Sequence[int]) -> list[int]:
    """The slot of each branch after the update: matched ones stay, the i-th unmatched takes the i-th gap."""
    found = match(experts, cached)
    free = [q for q in range(len(cached)) if q not in found]
    assigned = []
    for q in found:
        assigned.append(free.pop(0) if q is None else q)
    return assigned


def update_slots(
    slots: Sequence[Slot], experts: Sequence[int], values: Sequence[float], computed: Sequence[Tensor | None]
) -> list[Slot]:
    """The token's slots after the step; `computed[p]` is branch p's new feature, None if reused."""
    updated = list(slots)
    for p, q in enumerate(assign_slots(experts, [slot.expert for slot in slots])):
        feature = computed[p]
        if feature is not None:
            updated[q] = Slot(experts[p], values[p], feature)
    return updated


def combine(weights: Sequence[float], features: Sequence[Tensor]) -> Tensor:
    """y = sum_p w_p * h_p with the current weights, whether h_p is new or cached (Eq. 8)."""
    result = weights[0] * features[0]
    for weight, feature in zip(weights[1:], features[1:], strict=True):
        result = result + weight * feature
    return result
