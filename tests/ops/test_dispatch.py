"""Dispatch: grouping branches by expert, running them and combining them equals a loop over tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeca_fx.ops import branch_plan, dispatch

ids = st.lists(st.integers(0, 4), max_size=24)


@given(ids)
def test_branch_plan_groups_stably(expert: list[int]) -> None:
    order, offsets = branch_plan(torch.tensor(expert, dtype=torch.int64), 5)
    assert order.tolist() == sorted(range(len(expert)), key=expert.__getitem__)  # sorted() is stable
    assert offsets.tolist() == [sum(e <= group for e in expert) for group in range(5)]


@given(ids)
def test_every_branch_returns_to_its_place(expert: list[int]) -> None:
    branch, row_expert, offsets = dispatch.plan_branches(torch.tensor(expert, dtype=torch.int64).view(-1, 1), 5)
    assert row_expert.tolist() == sorted(expert) and offsets[-1] == len(expert)
    grouped = branch.to(torch.float64).view(-1, 1)
    assert dispatch.ungroup_branches(grouped, branch).flatten().tolist() == list(range(len(expert)))


branches = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=12)


@given(branches, st.booleans())
def test_only_recomputed_branches_are_planned(pairs: list[tuple[int, int]], some_tokens: bool) -> None:
    """Two slots a token; with `some_tokens`, entry i of the decision stands for token 3 i + 1 of the cache."""
    pairs = pairs + pairs[: len(pairs) % 2]
    code = torch.tensor([c for c, _ in pairs], dtype=torch.int8).view(-1, 2)
    expert = torch.tensor([e for _, e in pairs]).view(-1, 2)
    row = torch.arange(len(code)) * 3 + 1 if some_tokens else None
    branch, local, row_expert, offsets = dispatch.plan_recomputed(code, expert, row, 5)
    picked = sorted((i for i, (c, _) in enumerate(pairs) if c), key=lambda i: pairs[i][1])
    assert local.tolist() == [i // 2 for i in picked]
    assert branch.tolist() == [(3 * (i // 2) + 1) * 2 + i % 2 if some_tokens else i for i in picked]
    assert row_expert.tolist() == [pairs[i][1] for i in picked]
    assert offsets.tolist() == [sum(e <= group for e in row_expert.tolist()) for group in range(5)]


def test_rows_are_taken_whatever_the_shape() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(dispatch.take_rows(x, torch.tensor([5, 0])), x.flatten(0, 1)[[5, 0]])
    assert torch.equal(dispatch.take_rows(x.flatten(0, 1), torch.tensor([4])), x[1, 1:2])


def test_gathered_branches_carry_their_tokens_row() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    found = dispatch.gather_branches(x, torch.tensor([0, 5, 11, 4]), 2)
    assert torch.equal(found, x.flatten(0, 1)[[0, 2, 5, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_combine_is_the_weighted_sum(dtype: torch.dtype) -> None:
    feature = torch.randn(2, 3, 4, 5).to(dtype)
    weight = torch.rand(2, 3, 4)
    like = torch.empty(2, 3, 5, dtype=dtype)
    found = dispatch.combine_branches(feature, weight, like)
    expected = torch.zeros(2, 3, 5, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            for p in range(4):
                expected[b, t] += weight[b, t, p].double() * feature[b, t, p].double()
    assert found.dtype == dtype and found.shape == like.shape
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    by_slot = dispatch.combine_slots(feature, weight)
    assert by_slot.dtype == dtype
    torch.testing.assert_close(by_slot.double(), expected, rtol=0, atol=tolerance)


def test_norms_of_half_precision_features_are_fp32() -> None:
    feature = torch.full((2, 3), 300.0, dtype=torch.float16)  # the sum of squares overflows in fp16
    found = dispatch.feature_norm(feature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((2,), 300.0 * 3**0.5))
