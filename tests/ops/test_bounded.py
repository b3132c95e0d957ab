"""bounded: forms for export give what the reference operations give, for none, one, some and all rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeca_fx.ops import bounded, dispatch, rows
from moeca_fx.ops.attention_rows import attention_rows
from moeca_fx.ops.grouped_linear import grouped_linear
from moeca_fx.policies import branch

BATCH, TOKENS, TOP_K, EXPERTS, WIDTH = 3, 5, 2, 4, 6
MASKS = {
    "none": torch.zeros(BATCH, TOKENS, dtype=torch.bool),
    "one": torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) == 7,
    "one at the end": torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) == 14,
    "one sample": torch.arange(BATCH)[:, None].expand(BATCH, TOKENS) == 1,
    "some": torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 4 == 1,
    "all": torch.ones(BATCH, TOKENS, dtype=torch.bool),
}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.booleans(), min_size=2, max_size=24))
def test_selected_rows_are_those_that_are_set_and_the_rest_is_distinct(chosen: list[bool]) -> None:
    mask = torch.tensor(chosen).unsqueeze(0)
    row, valid = bounded.select_rows(mask)
    assert torch.equal(row[valid], rows.select_rows(mask))
    assert len(row) == max(sum(chosen), 2) and len(row.unique()) == len(row)


@pytest.mark.parametrize("name", MASKS)
def test_only_valid_rows_are_written(name: str) -> None:
    mask, cache = MASKS[name], _random(BATCH, TOKENS, WIDTH)
    row, valid = bounded.select_rows(mask)
    values = _random(len(row), WIDTH, seed=1)
    expected = rows.write_rows(cache, row[valid], values[valid])
    assert torch.equal(bounded.write_rows(cache, row, values, valid), expected)
    assert int(bounded.count_valid(valid)) == int(mask.sum())


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", MASKS)
def test_attention_of_selected_rows(name: str, scale: float | None, kv_heads: int) -> None:
    mask = MASKS[name]
    row, valid = bounded.select_rows(mask)
    query = _random(len(row), 4, 8)
    key, value = (_random(BATCH, TOKENS, kv_heads, width, seed=seed) for width, seed in ((8, 1), (6, 2)))
    found = bounded.attention_rows(query, key, value, row, mask, scale)
    expected = attention_rows(query[valid], key, value, row[valid], scale)
    torch.testing.assert_close(found[valid], expected)
    assert found.shape == (len(row), 4, 6) and found.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_padded_experts_write_what_grouped_ones_do(name: str, bias: bool) -> None:
    mask, cache = MASKS[name], _random(BATCH, TOKENS, TOP_K, WIDTH)
    weight, shift = _random(EXPERTS, WIDTH, WIDTH, seed=3), _random(EXPERTS, WIDTH, seed=4) if bias else None
    expert = torch.rand(BATCH, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(5)).topk(TOP_K, -1).indices
    row, valid = bounded.select_rows(mask)
    x = _random(len(row), WIDTH, seed=6)
    slot_expert = expert.view(-1, 1, TOP_K)[row]
    code = bounded.valid_code((torch.arange(len(row) * TOP_K).view(-1, 1, TOP_K) % 3).to(torch.int8), valid)

    picked, local, _, offsets = dispatch.plan_recomputed(code, slot_expert, row, EXPERTS)
    hidden = grouped_linear(x.index_select(0, local), weight, shift, offsets)
    expected = rows.write_rows(cache, picked, hidden)

    local, row_expert, place = bounded.plan_padded(code, slot_expert, EXPERTS)
    padded = bounded.grouped_linear(x.index_select(0, local), weight, shift)
    assert torch.equal(row_expert, torch.arange(EXPERTS).repeat_interleave(len(padded) // EXPERTS))
    torch.testing.assert_close(
        bounded.write_branches(cache, bounded.take_branches(padded, code, place), code, row), expected
    )


def test_padded_experts_of_all_tokens_in_order() -> None:
    cache, values = torch.zeros(BATCH, TOKENS, TOP_K), torch.arange(1.0, 1 + 2 * EXPERTS * BATCH * TOKENS)
    expert = torch.arange(BATCH * TOKENS * TOP_K).view(BATCH, TOKENS, TOP_K) % EXPERTS
    code = torch.ones_like(expert)
    code[1] = 0
    local, row_expert, place = bounded.plan_padded(code, expert, EXPERTS)
    found = bounded.write_branches(cache, bounded.take_branches(values[: len(local)], code, place), code, None)
    entry = (found[code > 0] - 1).long()  # which table entry each recomputed branch was written from
    assert torch.equal(row_expert[entry], expert[code > 0])
    tokens = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS, 1).expand_as(code)[code > 0]
    assert torch.equal(local[entry], tokens) and len(entry.unique()) == len(entry)
    assert not found[1].any()


def test_activation_without_an_adding_scatter() -> None:
    activation = _random(BATCH, EXPERTS, TOKENS).abs()
    expert = torch.rand(BATCH, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(5)).topk(TOP_K, -1).indices
    found = bounded.update_activation(activation, expert, 0.65)
    torch.testing.assert_close(found, branch.update_activation(activation, expert, 0.65))
