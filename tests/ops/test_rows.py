"""Row functions: whatever the layout of a dense tensor, rows are taken out and put back where they belong."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeca_fx.ops import rows

LAYOUTS = {(0, 1): "bt", (0, 2): "bht", (1, 0): "tb", (1, 3): "hbdt", (2, 0): "thb"}
SIZE = {"b": 3, "t": 5, "h": 2, "d": 4}


@st.composite
def dense_tensors(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int], int]:
    """A dense tensor with a sample and a token axis somewhere, both places, and T."""
    axes = draw(st.sampled_from(sorted(LAYOUTS)))
    batch, tokens, width = (draw(st.integers(1, 4)) for _ in range(3))
    sizes = SIZE | {"b": batch, "t": tokens}
    shape = [*(sizes[letter] for letter in LAYOUTS[axes]), width]
    return torch.arange(float(torch.Size(shape).numel())).view(shape), axes, tokens


@st.composite
def picked(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int], int, Tensor]:
    dense, axes, tokens = draw(dense_tensors())
    total = dense.shape[axes[0]] * tokens
    chosen = draw(st.lists(st.integers(0, total - 1), unique=True))
    return dense, axes, tokens, torch.tensor(sorted(chosen), dtype=torch.int64)


@given(dense_tensors())
def test_tokens_first_and_back(case: tuple[Tensor, tuple[int, int], int]) -> None:
    dense, axes, tokens = case
    cache = rows.tokens_first(dense, *axes, tokens)
    assert cache.is_contiguous() and cache.shape[:2] == (dense.shape[axes[0]], tokens)
    assert torch.equal(rows.tokens_back(cache, *axes), dense)


@given(picked())
def test_gathered_rows_are_the_tokens(case: tuple[Tensor, tuple[int, int], int, Tensor]) -> None:
    dense, axes, tokens, row = case
    taken = rows.gather_rows(dense, row, *axes)
    assert taken.dim() == dense.dim() and taken.shape[axes[1]] == 1
    found = rows.rows_first(taken, *axes)
    for index, flat in enumerate(row.tolist()):
        one = dense.select(axes[0], flat // tokens)
        token_axis = axes[1] - (axes[0] < axes[1])
        assert torch.equal(found[index], one.select(token_axis, flat % tokens))


@given(picked())
def test_written_rows_and_no_others_change(case: tuple[Tensor, tuple[int, int], int, Tensor]) -> None:
    dense, axes, tokens, row = case
    cache = rows.tokens_first(dense, *axes, tokens)
    fresh = -1.0 - rows.rows_first(rows.gather_rows(dense, row, *axes), *axes)
    written = rows.write_rows(cache, row, fresh)
    assert torch.equal(rows.tokens_back(cache, *axes), dense)  # untouched
    expected = cache.flatten(0, 1).clone()
    for index, flat in enumerate(row.tolist()):
        expected[flat] = fresh[index]
    assert torch.equal(written.flatten(0, 1), expected)
    place = cache.data_ptr()
    in_place = rows.write_rows_(cache, row, fresh)
    assert in_place is cache and cache.data_ptr() == place and torch.equal(cache, written)


@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_merged_rows(batch: int, tokens: int, data: st.DataObject) -> None:
    merged = torch.arange(float(batch * tokens * 2)).view(batch * tokens, 2)
    row = torch.tensor(data.draw(st.lists(st.integers(0, batch * tokens - 1), unique=True)), dtype=torch.int64)
    assert torch.equal(rows.rows_first(rows.gather_rows(merged, row, 0, 0), 0, 0), merged[row])
    cache = rows.tokens_first(merged, 0, 0, tokens)
    assert cache.shape == (batch, tokens, 2)
    assert torch.equal(rows.tokens_back(cache, 0, 0), merged)


@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_entries_of_samples_and_of_tokens(batch: int, tokens: int, data: st.DataObject) -> None:
    row = torch.tensor(data.draw(st.lists(st.integers(0, batch * tokens - 1))), dtype=torch.int64)
    scale, table = torch.randn(batch, 1, 2), torch.randn(1, tokens, 2)
    dense = (scale + table).expand(batch, tokens, 2)
    of_samples = rows.gather_samples(scale, row, tokens, 0)
    of_tokens = rows.gather_tokens(table, row, tokens, 0, 1)
    assert torch.equal(of_samples + of_tokens, rows.gather_rows(dense, row, 0, 1))


def test_values_are_stored_in_the_dtype_of_the_cache() -> None:
    cache = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    row, values = torch.tensor([1]), torch.full((1, 3), 1.5, dtype=torch.float64)
    assert rows.write_rows(cache, row, values).dtype == torch.bfloat16
    assert rows.write_rows_(cache, row, values)[0, 1].tolist() == [1.5] * 3


@given(st.lists(st.booleans(), min_size=1))
def test_select_rows_finds_the_set_entries(mask: list[bool]) -> None:
    found = rows.select_rows(torch.tensor(mask).view(1, -1))
    assert found.tolist() == [index for index, on in enumerate(mask) if on] and found.dtype == torch.int64


def test_pad_rank_prepends_axes() -> None:
    assert rows.pad_rank(torch.zeros(4, 2), 4).shape == (1, 1, 4, 2)
