"""Lists of rows and branches as `ops.bounded` has them: a `Range` clamped to at least two, and to all at most.

No NonZero, so that TensorRT takes them (`lengths="range"`); where fewer are selected, others fill up, and every write
mends what those were given. Shapes are those of the functions that the operations stand for.
"""

from collections.abc import Callable
from typing import Any

from moeca_fx.export.lengths import ListKind
from moeca_fx.export.onnx.padded_attention import attend, rows_by_sample
from moeca_fx.export.onnx.tables import table_of, take_branches, write_branches
from moeca_fx.export.onnx.values import (
    INT64,
    Value,
    as_dtype,
    number,
    numbers,
    op,
    places,
    sizes,
    tokens_of,
    top_k_of,
)
from moeca_fx.ops import bounded
from moeca_fx.ops.slots import REUSED

LIST = "list"
"""Under this the node that counts a list off has in memory what the list is: arguments of `lengths.GivenList`."""


def _count(most: Value, count: Value, kind: ListKind, **facts: int) -> Value:
    """``0 .. n - 1`` with n = `count` clamped to [2, most]; both []."""
    index = op.Range(number(0), op.Min(op.Max(count, number(2)), most), number(1))
    index.producer().meta[LIST] = {"kind": kind, **facts}
    return index


def _select_rows(mask: Value) -> tuple[Value, Value]:
    flat = op.Reshape(mask, numbers(-1))
    chosen = op.Cast(flat, to=INT64)
    selected, count, total = op.CumSum(chosen, number(0)), op.ReduceSum(chosen, keepdims=0), op.Size(flat)
    entry = op.Range(number(0), total, number(1))
    behind = op.Sub(op.Add(count, entry), selected)
    place = op.Where(flat, op.Sub(selected, number(1)), behind)
    index = _count(total, count, "rows")
    return op.Gather(op.ScatterElements(entry, place, entry, axis=0), index), op.Less(index, count)


def _valid_code(code: Value, valid: Value) -> Value:
    return op.Where(op.Unsqueeze(valid, numbers(1, 2)), code, number(REUSED))


def _write_rows(cache: Value, row: Value, values: Value, valid: Value) -> Value:
    """Only the first two rows of a list may fill up: what all were given is mended there."""
    place, values = places(row, tokens_of(cache)), as_dtype(values, cache.dtype)
    written = op.ScatterND(cache, place, values)
    first, second, axis = numbers(0), numbers(2), numbers(0)
    place, values, valid = (op.Slice(part, first, second, axis) for part in (place, values, valid))
    apply = op.Unsqueeze(valid, numbers(*range(1, len(cache.shape) - 1))) if len(cache.shape) > 2 else valid
    return op.ScatterND(written, place, op.Where(apply, values, op.GatherND(cache, place)))


def _attention_rows(query: Value, key: Value, value: Value, row: Value, mask: Value, scale: float | None) -> Value:
    tokens = tokens_of(mask)
    count, first = rows_by_sample(mask)
    index = _count(number(tokens), op.ReduceMax(count, keepdims=0), "queries")
    local = op.Min(op.Add(first, index), op.Sub(op.Size(row), number(1)))  # [B, S]
    out = attend(query, key, value, local, scale)
    sample = op.Div(row, number(tokens))
    entry = op.Range(number(0), op.Size(row), number(1))
    column = op.Sub(entry, op.Gather(op.Reshape(first, numbers(-1)), sample))
    column = op.Min(op.Max(column, number(0)), op.Sub(op.Size(index), number(1)))
    end = numbers(-1)
    place = op.Concat(op.Unsqueeze(sample, end), op.Unsqueeze(column, end), axis=-1)
    return op.GatherND(out, place)


def _positions(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, ...]:
    """[R]: what is recomputed, its expert, its position among the rows of that; [R, E]: how many until then."""
    flat, experts = numbers(-1), numbers(*range(num_experts))
    picked = op.Greater(op.Reshape(code, flat), number(REUSED))
    ids = op.Reshape(slot_expert, flat)
    column = op.Unsqueeze(ids, numbers(1))
    mine = op.And(op.Equal(column, experts), op.Unsqueeze(picked, numbers(1)))
    before = op.CumSum(op.Cast(mine, to=INT64), number(0))
    position = op.Sub(op.Squeeze(op.GatherElements(before, column, axis=1), numbers(1)), number(1))
    return picked, ids, position, before


def _plan_grouped(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, ...]:
    picked, ids, position, before = _positions(code, slot_expert, num_experts)
    count = op.ReduceMax(before, numbers(0), keepdims=0)
    total = op.ReduceSum(count, keepdims=0)
    nothing = op.Cast(op.Equal(total, number(0)), to=INT64)
    last = numbers(*(int(index == num_experts - 1) for index in range(num_experts)))
    count = op.Add(count, op.Mul(nothing, last))
    offsets = op.CumSum(count, number(0))
    size = op.Add(total, nothing)
    entry = op.Add(op.Gather(op.Sub(offsets, count), ids), position)
    table = table_of(op.Where(picked, entry, size), size, op.Size(ids))
    place = op.Min(op.Max(entry, number(0)), op.Sub(size, number(1)))
    return op.Div(table, top_k_of(code)), op.Gather(ids, table), place, offsets


def plan_padded(
    code: Value, slot_expert: Value, num_experts: int, *, may_overflow: bool = False
) -> tuple[Value, Value, Value]:
    """See `ops.bounded.plan_padded`; where a group `may_overflow` what has no room in it is left out of the table."""
    flat, experts = numbers(-1), numbers(*range(num_experts))
    picked, ids, position, before = _positions(code, slot_expert, num_experts)
    branches = op.Size(ids)
    index = _count(branches, op.ReduceMax(before, keepdims=0), "group", top_k=sizes(code)[-1] or 1, experts=num_experts)
    width = op.Size(index)
    if may_overflow:
        picked = op.And(picked, op.Less(position, width))
    size = op.Mul(width, number(num_experts))
    entry = op.Add(op.Mul(ids, width), position)
    place = op.Min(op.Max(entry, number(0)), op.Sub(size, number(1)))
    table = table_of(op.Where(picked, entry, size), size, branches)
    owner = op.Reshape(op.Add(op.Unsqueeze(experts, numbers(1)), op.Mul(index, number(0))), flat)
    return op.Div(table, top_k_of(code)), owner, place


def _count_valid(valid: Value) -> Value:
    return op.ReduceSum(op.Cast(valid, to=INT64), keepdims=0)


def _write_computed(cache: Value, values: Value, place: Value, code: Value, row: Value | None) -> Value:
    return write_branches(cache, take_branches(values, code, place), code, row)


BOUNDED_LISTS: dict[Callable[..., Any], Callable[..., Any]] = {
    bounded.select_rows: _select_rows,
    bounded.count_valid: _count_valid,
    bounded.valid_code: _valid_code,
    bounded.write_rows: _write_rows,
    bounded.attention_rows: _attention_rows,
    bounded.plan_padded: plan_padded,
    bounded.plan_grouped: _plan_grouped,
    bounded.write_computed: _write_computed,
}
