"""Lists of rows and branches that are as long as what they hold, of none too: `lengths="nonzero"`, for onnxruntime.

    row, valid = select_rows(mask)        row = NonZero(mask); valid is true everywhere
    cache = write_rows(cache, row, v)     one ScatterND, because nothing fills a list up

TensorRT refuses NonZero, and torch's compilers lengths below two: for those there is `bounded_lists`. Reductions name
their axes from the front: onnxruntime 1.31 gives an empty tensor a wrong shape where the axis is negative.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir

from moeca_fx.export.onnx.padded_attention import attend, rows_by_sample
from moeca_fx.export.onnx.tables import NORM_OF, feature_norm, table_of, top_k_and_widths
from moeca_fx.export.onnx.values import (
    FLOAT,
    INT64,
    Value,
    as_dtype,
    number,
    numbers,
    one_hot,
    op,
    places,
    real,
    sizes,
    tokens_of,
    top_k_of,
)
from moeca_fx.ops import bounded
from moeca_fx.ops.slots import REUSED

_ROW = "row"
"""Under this what says which rows of a list are valid has in memory that list."""

_BRANCHES = "branches"
"""Under this the places of a plan without gaps have in memory which branch each of its entries is."""

_END = 2**62


def _select_rows(mask: Value) -> tuple[Value, Value]:
    row = op.Squeeze(op.NonZero(op.Reshape(mask, numbers(-1))), numbers(0))
    valid = op.GreaterOrEqual(row, number(0))
    valid.meta[_ROW] = row
    return row, valid


def _count_valid(valid: Value) -> Value:
    """As many as the list has rows."""
    count = op.Shape(valid.meta[_ROW])
    count.dtype, count.shape = INT64, onnx_ir.Shape([1])
    return op.Squeeze(count, numbers(0))


def _valid_code(code: Value, valid: Value) -> Value:
    return op.Identity(code)


def _write_rows(cache: Value, row: Value, values: Value, valid: Value) -> Value:
    return op.ScatterND(cache, places(row, tokens_of(cache)), as_dtype(values, cache.dtype))


def _attention_rows(query: Value, key: Value, value: Value, row: Value, mask: Value, scale: float | None) -> Value:
    """Padded to the fullest sample; the padded queries that are real are those of the list, in its order."""
    count, first = rows_by_sample(mask)
    column = op.Range(number(0), op.ReduceMax(count, keepdims=0), number(1))  # [S]
    local = op.Add(first, op.Min(column, op.Sub(count, number(1))))  # -1, the last, where there are none before
    out = attend(query, key, value, local, scale)
    is_real = op.Reshape(op.Less(column, count), numbers(-1))
    heads, width = sizes(query)[1], sizes(value)[-1]
    assert heads is not None and width is not None, "heads and their width are fixed"
    flat = op.Reshape(out, numbers(-1, heads, width))
    return op.Gather(flat, op.Squeeze(op.NonZero(is_real), numbers(0)), axis=0)


def _groups(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, Value, Value, Value]:
    """What is computed of all branches [R], their experts and, where computed, their positions in those; [E] rows."""
    flat = numbers(-1)
    ids, picked = op.Reshape(slot_expert, flat), op.Greater(op.Reshape(code, flat), number(REUSED))
    mine = op.Gather(one_hot(num_experts, INT64, rest=1), op.Where(picked, ids, number(num_experts)), axis=0)
    before = op.CumSum(mine, number(0))  # [R, E]
    position = op.GatherElements(before, op.Unsqueeze(ids, numbers(1)), axis=1)
    last = op.Slice(before, numbers(-1), numbers(_END), numbers(0))  # nothing, where there are no branches
    count = op.ReduceSum(last, numbers(0), keepdims=0)
    return picked, ids, op.Sub(op.Squeeze(position, numbers(1)), number(1)), count


def _plan_padded(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, Value, Value]:
    picked, ids, position, count = _groups(code, slot_expert, num_experts)
    width = op.ReduceMax(count, keepdims=0)
    size = op.Mul(width, number(num_experts))
    place = op.Where(picked, op.Add(op.Mul(ids, width), position), size)
    table = table_of(place, size, op.Size(ids))
    owner = op.Div(op.Range(number(0), size, number(1)), width)
    return op.Div(table, top_k_of(code)), owner, place


def _plan_grouped(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, Value, Value, Value]:
    picked, ids, position, count = _groups(code, slot_expert, num_experts)
    offsets, size = op.CumSum(count, number(0)), op.ReduceSum(count, keepdims=0)
    entry = op.Add(op.Gather(op.Sub(offsets, count), ids), position)
    place = op.Where(picked, entry, size)
    branch = table_of(place, size, op.Size(ids))
    place.meta[_BRANCHES] = branch
    return op.Div(branch, top_k_of(code)), op.Gather(ids, branch), place, offsets


def _take_branches(values: Value, code: Value, place: Value) -> Value:
    """What is not computed is placed behind everything that is: one row of zeros."""
    top_k, *widths = top_k_and_widths(code, values)
    nothing = op.Expand(op.CastLike(real(0.0, FLOAT), values), numbers(1, *widths))
    taken = op.Gather(op.Concat(values, nothing, axis=0), place)
    return op.Reshape(taken, numbers(-1, top_k, *widths))


def _write_computed(cache: Value, values: Value, place: Value, code: Value, row: Value | None) -> Value:
    """The computed branches alone, each where its slot lies: [N, rest] into [B, T, k, rest]."""
    flat, end, top_k = numbers(-1), numbers(1), top_k_of(code)
    branch = place.meta.get(_BRANCHES)
    if branch is None:  # a table with gaps: pick from it
        picked = op.NonZero(op.Greater(op.Reshape(code, flat), number(REUSED)))
        branch = op.Squeeze(picked, numbers(0))
        values = _taken(values, op.Gather(place, branch))
    token, tokens = op.Div(branch, top_k), tokens_of(cache)
    place_of = places(token, tokens) if row is None else op.Gather(places(row, tokens), token)
    slot = op.Concat(place_of, op.Unsqueeze(op.Mod(branch, top_k), end), axis=-1)
    return op.ScatterND(cache, slot, as_dtype(values, cache.dtype))


def _taken(values: Value, place: Value) -> Value:
    """Entries of a table; norms of those alone, whose features are taken anyway."""
    feature = values.meta.get(NORM_OF)
    source = values if feature is None else feature
    taken = op.Gather(source, place)
    taken.dtype, taken.shape = source.dtype, onnx_ir.Shape([None, *list(source.shape)[1:]])
    return taken if feature is None else feature_norm(taken)


EXACT_LISTS: dict[Callable[..., Any], Callable[..., Any]] = {
    bounded.select_rows: _select_rows,
    bounded.count_valid: _count_valid,
    bounded.valid_code: _valid_code,
    bounded.write_rows: _write_rows,
    bounded.attention_rows: _attention_rows,
    bounded.plan_padded: _plan_padded,
    bounded.plan_grouped: _plan_grouped,
    bounded.take_branches: _take_branches,
    bounded.write_computed: _write_computed,
}
