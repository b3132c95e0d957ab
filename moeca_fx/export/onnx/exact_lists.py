"""Lists of rows and branches that are as long as what they hold, of none too: `lengths="nonzero"`, for onnxruntime.

    row, valid = select_rows(mask)        row = NonZero(mask); valid is true everywhere
    cache = write_rows(cache, row, v)     one ScatterND, because nothing fills a list up

TensorRT refuses NonZero, and torch's compilers lengths below two: for those there is `bounded_lists`. Reductions name
their axes from the front: onnxruntime 1.31 gives an empty tensor a wrong shape where the axis is negative.
"""

from collections.abc import Callable
from typing import Any

from moeca_fx.export.onnx.padded_attention import attend, rows_by_sample
from moeca_fx.export.onnx.tables import table_of
from moeca_fx.export.onnx.values import (
    INT64,
    Value,
    as_dtype,
    number,
    numbers,
    op,
    places,
    tokens_of,
    top_k_of,
)
from moeca_fx.ops import bounded
from moeca_fx.ops.slots import REUSED


def _select_rows(mask: Value) -> tuple[Value, Value]:
    row = op.Squeeze(op.NonZero(op.Reshape(mask, numbers(-1))), numbers(0))
    return row, op.GreaterOrEqual(row, number(0))


def _valid_code(code: Value, valid: Value) -> Value:
    return op.Identity(code)


def _write_rows(cache: Value, row: Value, values: Value, valid: Value) -> Value:
    return op.ScatterND(cache, places(row, tokens_of(cache)), as_dtype(values, cache.dtype))


def _attention_rows(query: Value, key: Value, value: Value, row: Value, mask: Value, scale: float | None) -> Value:
    """Padded to the fullest sample; the padded queries that are real are those of the list, in its order."""
    count, first = rows_by_sample(mask)
    column = op.Range(number(0), op.ReduceMax(count, keepdims=0), number(1))  # [S]
    out = attend(query, key, value, row, first, column, scale)
    is_real = op.NonZero(op.Less(column, op.Unsqueeze(count, numbers(1))))
    return op.GatherND(out, op.Transpose(is_real, perm=[1, 0]))


def _computed(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, Value, Value, Value]:
    """What is computed: picked [R], ids [R] and number [R] of all branches, and mine [E, R].

    Branch 0 is computed whatever the decision, for nobody if it is not picked: every branch finds some row then.
    """
    flat = numbers(-1)
    ids = op.Reshape(slot_expert, flat)
    number_of = op.Range(number(0), op.Size(ids), number(1))
    picked = op.Or(op.Greater(op.Reshape(code, flat), number(REUSED)), op.Equal(number_of, number(0)))
    experts = op.Unsqueeze(numbers(*range(num_experts)), numbers(1))
    mine = op.And(op.Equal(op.Unsqueeze(ids, numbers(0)), experts), op.Unsqueeze(picked, numbers(0)))
    return picked, ids, number_of, mine


def _plan_padded(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, Value, Value]:
    picked, ids, _, mine = _computed(code, slot_expert, num_experts)
    count = op.Cast(mine, to=INT64)
    width = op.ReduceMax(op.ReduceSum(count, numbers(1), keepdims=0), keepdims=0)
    before = op.GatherElements(op.CumSum(count, number(1)), op.Unsqueeze(ids, numbers(0)), axis=0)
    position = op.Sub(op.Squeeze(before, numbers(0)), number(1))  # among the rows of its expert
    entry = op.Add(op.Mul(ids, width), position)
    size = op.Mul(width, number(num_experts))
    table = table_of(op.Where(picked, entry, size), size, op.Size(ids))
    owner = op.Div(op.Range(number(0), size, number(1)), width)
    return op.Div(table, top_k_of(code)), owner, op.Where(picked, entry, number(0))


def _plan_grouped(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, Value, Value, Value]:
    _, _, number_of, mine = _computed(code, slot_expert, num_experts)
    count = op.ReduceSum(op.Cast(mine, to=INT64), numbers(1), keepdims=0)
    expert, branch = op.Split(op.NonZero(mine), axis=0, num_outputs=2)  # by expert, then by branch
    branch = op.Squeeze(branch, numbers(0))
    nowhere = op.Mul(number_of, number(0))
    place = op.ScatterElements(nowhere, branch, op.Range(number(0), op.Size(branch), number(1)), axis=0)
    return op.Div(branch, top_k_of(code)), op.Squeeze(expert, numbers(0)), place, op.CumSum(count, number(0))


def _write_computed(cache: Value, values: Value, place: Value, code: Value, row: Value | None) -> Value:
    """The picked branches alone, each where its slot lies: [N, rest] into [B, T, k, rest]."""
    flat, end, top_k = numbers(-1), numbers(1), top_k_of(code)
    picked = op.NonZero(op.Greater(op.Reshape(code, flat), number(REUSED)))
    picked = op.Squeeze(picked, numbers(0))
    token = op.Div(picked, top_k)
    token = token if row is None else op.Gather(row, token)
    slot = op.Concat(places(token, tokens_of(cache)), op.Unsqueeze(op.Mod(picked, top_k), end), axis=-1)
    return op.ScatterND(cache, slot, as_dtype(op.Gather(values, op.Gather(place, picked)), cache.dtype))


EXACT_LISTS: dict[Callable[..., Any], Callable[..., Any]] = {
    bounded.select_rows: _select_rows,
    bounded.valid_code: _valid_code,
    bounded.write_rows: _write_rows,
    bounded.attention_rows: _attention_rows,
    bounded.plan_padded: _plan_padded,
    bounded.plan_grouped: _plan_grouped,
    bounded.write_computed: _write_computed,
}
