"""Expert choice: grouping slots by expert, running them and summing them by token equals a loop over slots."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeca_fx.ops import chosen, dispatch
from tests.helpers.choices import choices, numbers

Case = tuple[Tensor, Tensor, int]


def _slots(token: Tensor) -> list[tuple[int, int, int]]:
    return list(itertools.product(*(range(size) for size in token.shape)))


@given(choices())
def test_every_expert_owns_one_slice_of_the_plan(case: Case) -> None:
    token, _, tokens = case
    source, row_expert, offsets = chosen.plan_chosen(token, tokens)
    batch, experts, capacity = token.shape
    assert offsets.tolist() == [batch * capacity * (e + 1) for e in range(experts)]
    assert row_expert.tolist() == sorted(row_expert.tolist())
    expected = [(e, b * tokens + int(token[b, e, c])) for b, e, c in _slots(token)]
    assert sorted(zip(row_expert.tolist(), source.tolist(), strict=True)) == sorted(expected)


@given(choices())
def test_every_slot_returns_to_its_place(case: Case) -> None:
    token, _, tokens = case
    source, row_expert, _ = chosen.plan_chosen(token, tokens)
    rows = torch.stack([source, row_expert], -1)
    back = chosen.ungroup_chosen(rows, token)
    assert back.tolist() == [[b * tokens + int(token[b, e, c]), e] for b, e, c in _slots(token)]
    assert chosen.owners(token).flatten().tolist() == [e for _, e, _ in _slots(token)]


@given(choices(), st.data())
def test_picked_branches_read_their_tokens(case: Case, data: st.DataObject) -> None:
    token, _, tokens = case
    code = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=token.numel(), max_size=token.numel())), dtype=torch.int8
    ).view(token.shape)
    branch, _, row_expert, offsets = dispatch.plan_recomputed(code, chosen.owners(token), None, token.shape[1])
    places = _slots(token)
    assert sorted(branch.tolist()) == [i for i, place in enumerate(places) if code[place] > 0]
    assert row_expert.tolist() == sorted(places[i][1] for i in branch.tolist())
    assert offsets.tolist() == [sum(code[:, : e + 1].flatten().gt(0)).__int__() for e in range(token.shape[1])]
    wanted = [places[i][0] * tokens + int(token[places[i]]) for i in branch.tolist()]
    assert chosen.source_rows(token, branch, tokens).tolist() == wanted
    marked = {(b, int(token[b, e, c])) for b, e, c in places if code[b, e, c] > 0}
    mask = chosen.chosen_mask(code, token, tokens)
    assert {tuple(place) for place in mask.nonzero().tolist()} == marked


@given(choices(), st.integers(0, 99))
def test_the_sum_goes_to_the_tokens(case: Case, seed: int) -> None:
    token, _, tokens = case
    width = 3
    feature = numbers(token.unsqueeze(-1).expand(*token.shape, width), seed)
    weight = numbers(token, seed + 1)
    expected = torch.zeros(token.shape[0], tokens, width, dtype=torch.float64)
    for b, e, c in _slots(token):
        expected[b, token[b, e, c]] += weight[b, e, c] * feature[b, e, c]
    torch.testing.assert_close(chosen.combine_chosen_slots(feature, token, weight, tokens), expected)
    for like in (expected, expected.flatten(0, 1)):
        found = chosen.combine_chosen(feature.flatten(0, 2), token, weight, like)
        torch.testing.assert_close(found, expected.view(like.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_the_wider_dtype(dtype: torch.dtype) -> None:
    token = torch.zeros(1, 64, 1, dtype=torch.int64)  # 64 experts chose one token: a bf16 sum would stall
    feature, weight = torch.ones(1, 64, 1, 2, dtype=dtype), torch.full((1, 64, 1), 1.01)
    found = chosen.combine_chosen_slots(feature, token, weight, 1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), torch.full((1, 1, 2), 64.64, dtype=torch.float64), rtol=1e-2, atol=0)
