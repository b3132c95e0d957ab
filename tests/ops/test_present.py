"""Slots without an expert are not gathered and not computed; their features are zero."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moeca_fx.ops import dispatch, present

EXPERTS, WIDTH = 3, 2
tokens = st.lists(st.lists(st.integers(0, EXPERTS), min_size=2, max_size=2), min_size=1, max_size=8)


@given(tokens)
def test_only_slots_with_an_expert_run(ids: list[list[int]]) -> None:
    expert = torch.tensor(ids)
    code = present.present_code(expert.flatten(), EXPERTS, 2)
    x = torch.randn(len(ids), WIDTH, dtype=torch.float64)
    branch, local, row_expert, offsets = dispatch.plan_recomputed(code, expert, None, EXPERTS)
    there = [i for i, e in enumerate(expert.flatten().tolist()) if e < EXPERTS]
    assert sorted(branch.tolist()) == there and int(offsets[-1]) == len(there)
    assert bool((row_expert < EXPERTS).all())
    feature = present.spread(dispatch.take_rows(x, local) * (row_expert + 1).unsqueeze(-1), branch, code)
    for i, e in enumerate(expert.flatten().tolist()):
        expected = x[i // 2] * (e + 1) if e < EXPERTS else torch.zeros(WIDTH, dtype=torch.float64)
        assert torch.equal(feature[i], expected)


@given(tokens)
def test_counts_leave_empty_slots_out(ids: list[list[int]]) -> None:
    expert = torch.tensor(ids)
    there = expert != EXPERTS
    assert int(present.count_present(expert, EXPERTS)) == int(there.sum())
    code = torch.where(there, torch.arange(expert.numel()).view_as(expert) % 3, 0).to(torch.int8)
    assert int(present.count_matched_present(code, expert, EXPERTS)) == int((there & (code < 2)).sum())
