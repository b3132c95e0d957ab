"""Decisions where slots may be empty equal plain loops over the branches that are there."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_fx.policies import branch, empty_slots
from moeca_fx.policies.branch import ScoreWeight
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold
from tests.reference import sparse_site
from tests.reference.moe_site import Slot

settings.register_profile("empty", max_examples=80, deadline=None, derandomize=True)
settings.load_profile("empty")

Case = tuple[Tensor, Tensor, int]


@st.composite
def routings(draw: st.DrawFn, empty: bool = True) -> Case:
    """(now [B, T, k], cached [B, T, k], E): the experts of a token differ, any number of its slots may be `empty`."""
    experts = draw(st.integers(1, 5))
    k = draw(st.integers(1, min(experts, 4)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))

    def one() -> Tensor:
        rows = []
        for _ in range(shape[0] * shape[1]):
            order = draw(st.permutations(range(experts)))[:k]
            rows.append([experts if empty and draw(st.booleans()) else e for e in order])
        return torch.tensor(rows).reshape(*shape, k)

    return one(), one(), experts


def _numbers(like: Tensor, seed: int, there: Tensor) -> Tensor:
    values = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    return values * there


@given(routings(), st.integers(0, 999), st.sampled_from(["share", "raw"]))
def test_decisions_equal_the_reference(case: Case, seed: int, kind: ScoreWeight) -> None:
    now, cached, experts = case
    weight = _numbers(now, seed, now != experts)
    then, norm = (_numbers(cached, seed + i, cached != experts) for i in (1, 2))
    threshold = torch.rand(now.shape[0], experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rule = BranchRule(selector=ScoreThreshold(score_weight=kind))
    assert isinstance(rule.selector, ScoreThreshold)
    options = (rule.selector.lambda1, rule.selector.lambda2, kind, experts)
    slot, held, _, code = empty_slots.decide(now, weight, cached, then, norm, threshold, *options)
    rank = empty_slots.rank_by_score(now, weight, cached, then, norm, *options)
    by_slot = branch.to_slots(weight, slot)
    for b, t in ((b, t) for b in range(now.shape[0]) for t in range(now.shape[1])):
        slots: sparse_site.Slots = [
            Slot(e, w, torch.tensor([n])) if e != experts else None
            for e, w, n in zip(cached[b, t].tolist(), then[b, t].tolist(), norm[b, t].tolist(), strict=True)
        ]
        found = sparse_site.branches(now[b, t].tolist(), weight[b, t].tolist(), experts, kind)
        decision, margins = sparse_site.decide(found, slots, threshold[b].tolist(), rule)
        assume(min(margins, default=1.0) > 1e-9)
        where = sparse_site.place_all(found, slots)
        assert slot[b, t].tolist() == [where[p] for p in range(now.shape[2])]
        expected = {where[p]: again for p, again in decision.items()}
        assert [int(c) > 0 for c in code[b, t]] == [expected.get(q, False) for q in range(now.shape[2])]
        inverse = {q: p for p, q in where.items()}
        for q in range(now.shape[2]):
            was, new = int(cached[b, t, q]), int(now[b, t, inverse[q]])
            assert int(held[b, t, q]) == (was if new == experts else new)
            assert int(code[b, t, q] == 2) == int(new not in (was, experts))
            assert bool(rank[b, t, q].isfinite()) == (new == was != experts)
            assert float(by_slot[b, t, q]) == float(weight[b, t, inverse[q]])


@given(routings(empty=False), st.integers(0, 999))
def test_without_empty_slots_nothing_changes(case: Case, seed: int) -> None:
    now, cached, experts = case
    full = torch.ones_like(now, dtype=torch.bool)
    weight, then, norm = (_numbers(now, seed + index, full) for index in range(3))
    threshold = torch.rand(now.shape[0], experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    arguments = (now, weight, cached, then, norm, threshold, 1.1, 0.6, "share")
    for found, expected in zip(empty_slots.decide(*arguments, experts), branch.decide(*arguments), strict=True):
        assert torch.equal(found, expected)
    picking = (now, weight, cached, then, weight > 0.5, "share", 0.05)
    for found, expected in zip(
        empty_slots.decide_picked(*picking, experts), branch.decide_picked(*picking), strict=True
    ):
        assert torch.equal(found, expected)


@given(routings(), st.integers(0, 999))
def test_a_margin_never_keeps_a_slot_that_was_never_filled(case: Case, seed: int) -> None:
    now, cached, experts = case
    weight, then = _numbers(now, seed, now != experts), _numbers(cached, seed + 1, cached != experts)
    picked = torch.zeros_like(now, dtype=torch.bool)
    slot, held, _, code = empty_slots.decide_picked(now, weight, cached, then, picked, "share", 9.0, experts)
    placed = branch.to_slots(now, slot)
    new = (placed != experts) & (cached == experts)
    assert torch.equal(code == 2, new)
    assert torch.equal(held, torch.where(new, placed, cached))


@given(routings())
def test_activation_counts_the_experts_that_are_there(case: Case) -> None:
    now, _, experts = case
    before = torch.ones(now.shape[0], experts, now.shape[1], dtype=torch.float64)
    found = empty_slots.update_activation(before, now, 0.25, experts)
    for b, e, t in ((b, e, t) for b in range(now.shape[0]) for e in range(experts) for t in range(now.shape[1])):
        assert float(found[b, e, t]) == 0.25 + 0.75 * (e in now[b, t].tolist())
