"""MoECa at one site whose tokens may have fewer experts than slots, for one token at a time, in plain Python.

A slot is empty (None) until it is first filled. A branch that is not there changes nothing: the slot in whose place it
stands keeps its expert, which is found again when it comes back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold, Unmatched
from tests.reference import moe_site
from tests.reference.moe_site import Slot

Slots = list[Slot | None]


@dataclass(frozen=True)
class Branch:
    """One branch of a token now: its place in the router's order, expert, weight, and weight as the score sees it."""

    place: int
    expert: int
    weight: float
    value: float


def branches(experts: Sequence[int], weights: Sequence[float], num_experts: int, kind: str) -> list[Branch]:
    """The branches that are there."""
    there = [p for p, e in enumerate(experts) if e != num_experts]
    values = moe_site.score_values([weights[p] for p in there], kind)
    return [Branch(p, experts[p], weights[p], value) for p, value in zip(there, values, strict=True)]


def place_all(found: Sequence[Branch], slots: Slots) -> dict[int, int]:
    """Slot of each branch by its place: its own, or the i-th free one for the i-th place that has none."""
    own = {b.place: q for b in found for q, slot in enumerate(slots) if slot is not None and slot.expert == b.expert}
    free = [q for q in range(len(slots)) if q not in own.values()]
    others = [p for p in range(len(slots)) if p not in own]  # places without a branch stand in line too
    return own | dict(zip(others, free, strict=True))


def decide(
    found: Sequence[Branch], slots: Slots, tau: Sequence[float], rule: BranchRule
) -> tuple[dict[int, bool], list[float]]:
    """Which branches are computed, by place; and how far each score is from its threshold."""
    where = place_all(found, slots)
    held = {q: slot for q, slot in enumerate(slots) if slot is not None}
    parts = dict(zip(held, moe_site.contribution([slot.feature for slot in held.values()]), strict=True))
    decision, margins = {}, []
    for b in found:
        slot = held.get(where[b.place])
        if slot is None or slot.expert != b.expert:
            decision[b.place] = True
        elif isinstance(rule.selector, Unmatched):
            decision[b.place] = False
        else:
            assert isinstance(rule.selector, ScoreThreshold)
            options = (rule.selector.lambda1, rule.selector.lambda2)
            score = moe_site.score(b.value, slot.weight, parts[where[b.place]], *options)
            decision[b.place] = score > tau[b.expert]
            margins.append(abs(score - tau[b.expert]))
    return decision, margins


def update(found: Sequence[Branch], slots: Slots, computed: dict[int, Tensor]) -> None:
    """The slots after a step, in place; `computed` has the features computed now, by place."""
    where = place_all(found, slots)
    for b in found:
        if b.place in computed:
            slots[where[b.place]] = Slot(b.expert, b.value, computed[b.place])


def combine(found: Sequence[Branch], slots: Slots, zero: Tensor) -> Tensor:
    """The sum of the branches' features under the weights of now; zero for a token without any."""
    held = {slot.expert: slot for slot in slots if slot is not None}
    total = zero
    for b in found:
        total = total + b.weight * held[b.expert].feature
    return total
