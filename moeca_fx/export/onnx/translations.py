"""What the operations of `whole` become in ONNX: the same formulas in fewer nodes than torch's own translation.

Every function takes and gives values of onnxscript. No NonZero and no scatter that adds, so that TensorRT takes them;
integers are int64 throughout. Shapes are those of the functions that the operations stand for.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import onnx_ir
import torch
from onnxscript import opset18

from moeca_fx.export.onnx.whole import WHOLE
from moeca_fx.ops import bounded, dispatch, rows, slots
from moeca_fx.ops.grouped_linear import grouped_linear
from moeca_fx.ops.slots import RECOMPUTED, REUSED, UNMATCHED
from moeca_fx.policies import branch
from moeca_fx.policies.branch import ALIKE_ENTROPIES

op: Any = opset18
Value = Any
_INT64, _FLOAT = onnx_ir.DataType.INT64, onnx_ir.DataType.FLOAT
_BOOL = onnx_ir.DataType.BOOL
_NARROW = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
_TINY = 1e-37  # its logarithm times zero is zero


def _number(value: int | float) -> Value:
    return op.Constant(value_float=value) if isinstance(value, float) else op.Constant(value_int=value)


def _numbers(*values: int) -> Value:
    return op.Constant(value_ints=list(values))


def _real(value: float, dtype: onnx_ir.DataType) -> Value:
    """A number of this dtype."""
    return op.Constant(value=onnx_ir.tensor(value, dtype=dtype))


def _as(value: Value, dtype: onnx_ir.DataType) -> Value:
    """A value in this dtype."""
    if value.dtype == dtype:
        return value
    made = op.Cast(value, to=dtype)
    made.dtype = dtype
    return made


def _wide(dtype: onnx_ir.DataType) -> onnx_ir.DataType:
    """At least fp32."""
    return _FLOAT if dtype in _NARROW else dtype


def _sizes(value: Value) -> list[int | None]:
    """Sizes; None is open."""
    return [size if isinstance(size, int) else None for size in value.shape]


def _count(most: Value, count: Value) -> Value:
    """``0 .. n - 1`` with n = `count` clamped to [2, most]; both []."""
    return op.Range(_number(0), op.Min(op.Max(count, _number(2)), most), _number(1))


def _places(row: Value, tokens: int) -> Value:
    """Sample and token of flat rows: [M] -> [M, 2]."""
    sample, token = op.Div(row, _number(tokens)), op.Mod(row, _number(tokens))
    last = _numbers(-1)
    return op.Concat(op.Unsqueeze(sample, last), op.Unsqueeze(token, last), axis=-1)


def _select_rows(mask: Value) -> tuple[Value, Value]:
    flat = op.Reshape(mask, _numbers(-1))
    chosen = op.Cast(flat, to=_INT64)
    selected, count, total = op.CumSum(chosen, _number(0)), op.ReduceSum(chosen, keepdims=0), op.Size(flat)
    number = op.Range(_number(0), total, _number(1))
    behind = op.Sub(op.Add(count, number), selected)
    place = op.Where(flat, op.Sub(selected, _number(1)), behind)
    index = _count(total, count)
    return op.Gather(op.ScatterElements(number, place, number, axis=0), index), op.Less(index, count)


def _valid_code(code: Value, valid: Value) -> Value:
    return op.Where(op.Unsqueeze(valid, _numbers(1, 2)), code, _number(REUSED))


def _write_rows(cache: Value, row: Value, values: Value, valid: Value) -> Value:
    """Only the first two rows of a list may fill up: what all were given is mended there."""
    place, values = _places(row, _tokens(cache)), _as(values, cache.dtype)
    written = op.ScatterND(cache, place, values)
    first, second, axis = _numbers(0), _numbers(2), _numbers(0)
    place, values, valid = (op.Slice(part, first, second, axis) for part in (place, values, valid))
    apply = op.Unsqueeze(valid, _numbers(*range(1, len(cache.shape) - 1))) if len(cache.shape) > 2 else valid
    return op.ScatterND(written, place, op.Where(apply, values, op.GatherND(cache, place)))


def _tokens(cache: Value) -> int:
    tokens = _sizes(cache)[1]
    assert tokens is not None, f"{cache.name}: the number of tokens is fixed"
    return tokens


def _take_branches(values: Value, code: Value, place: Value) -> Value:
    top_k, rest = _sizes(code)[-1], _sizes(values)[1:]
    assert top_k is not None and None not in rest, "k and widths are fixed"
    return op.Reshape(op.Gather(values, place), _numbers(-1, top_k, *(size or 0 for size in rest)))


def _write_branches(cache: Value, fresh: Value, code: Value, row: Value | None) -> Value:
    tokens, top_k, *rest = (size or -1 for size in _sizes(cache)[1:])
    fresh, picked = _as(fresh, cache.dtype), op.Greater(code, _number(REUSED))
    if row is None:
        fresh = op.Reshape(fresh, _numbers(-1, tokens, top_k, *rest))
        return op.Where(op.Reshape(picked, _numbers(-1, tokens, top_k, *(1 for _ in rest))), fresh, cache)
    picked = op.Reshape(picked, _numbers(-1, top_k, *(1 for _ in rest)))
    where = _places(row, tokens)
    return op.ScatterND(cache, where, op.Where(picked, fresh, op.GatherND(cache, where)))


def _attention_rows(query: Value, key: Value, value: Value, row: Value, mask: Value, scale: float | None) -> Value:
    tokens, heads, width = _tokens(mask), _sizes(query)[1], _sizes(query)[-1]
    assert heads is not None and width is not None, "heads and their width are fixed"
    count = op.ReduceSum(op.Cast(mask, to=_INT64), _numbers(1), keepdims=0)
    first = op.Sub(op.CumSum(count, _number(0)), count)
    index = _count(_number(tokens), op.ReduceMax(count, keepdims=0))
    last = op.Sub(op.Size(row), _number(1))
    local = op.Min(op.Add(op.Unsqueeze(first, _numbers(1)), index), last)  # [B, S]
    padded = op.Transpose(op.Gather(query, local), perm=[0, 2, 1, 3])  # [B, h, S, d]
    factor = _real(1 / math.sqrt(width) if scale is None else scale, query.dtype)
    key, value = (_for_every_head(part, heads) for part in (key, value))
    scores = op.MatMul(op.Mul(padded, factor), op.Transpose(key, perm=[0, 2, 3, 1]))
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Transpose(value, perm=[0, 2, 1, 3]))
    sample = op.Div(row, _number(tokens))
    number = op.Range(_number(0), op.Size(row), _number(1))
    column = op.Sub(number, op.Gather(first, sample))
    column = op.Min(op.Max(column, _number(0)), op.Sub(op.Size(index), _number(1)))
    end = _numbers(-1)
    place = op.Concat(op.Unsqueeze(sample, end), op.Unsqueeze(column, end), axis=-1)
    return op.GatherND(op.Transpose(out, perm=[0, 2, 1, 3]), place)


def _for_every_head(x: Value, heads: int) -> Value:
    _, tokens, own, width = _sizes(x)
    if own == heads:
        return x
    assert own is not None and tokens is not None and width is not None, "heads, tokens and widths are fixed"
    shape = op.Concat(op.Shape(x, start=0, end=1), _numbers(tokens, own, heads // own, width), axis=0)
    repeated = op.Expand(op.Unsqueeze(x, _numbers(3)), shape)
    return op.Reshape(repeated, _numbers(-1, tokens, heads, width))


def _positions(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, ...]:
    """[R]: what is recomputed, its expert, its position among the rows of that; [R, E]: how many until then."""
    flat, experts = _numbers(-1), _numbers(*range(num_experts))
    picked = op.Greater(op.Reshape(code, flat), _number(REUSED))
    ids = op.Reshape(slot_expert, flat)
    column = op.Unsqueeze(ids, _numbers(1))
    mine = op.And(op.Equal(column, experts), op.Unsqueeze(picked, _numbers(1)))
    before = op.CumSum(op.Cast(mine, to=_INT64), _number(0))
    position = op.Sub(op.Squeeze(op.GatherElements(before, column, axis=1), _numbers(1)), _number(1))
    return picked, ids, position, before


def _table(target: Value, size: Value, branches: Value) -> Value:
    """Branch of each of `size` entries; `target` [R] of what has none is `size`."""
    nothing = op.Expand(_number(0), op.Reshape(op.Add(size, _number(1)), _numbers(1)))
    table = op.ScatterElements(nothing, target, op.Range(_number(0), branches, _number(1)), axis=0)
    return op.Slice(table, _numbers(0), _numbers(-1), _numbers(0))


def _top_k(code: Value) -> Value:
    top_k = _sizes(code)[-1]
    assert top_k is not None, "k is fixed"
    return _number(top_k)


def _plan_grouped(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, ...]:
    picked, ids, position, before = _positions(code, slot_expert, num_experts)
    count = op.ReduceMax(before, _numbers(0), keepdims=0)
    total = op.ReduceSum(count, keepdims=0)
    nothing = op.Cast(op.Equal(total, _number(0)), to=_INT64)
    last = _numbers(*(int(index == num_experts - 1) for index in range(num_experts)))
    count = op.Add(count, op.Mul(nothing, last))
    offsets = op.CumSum(count, _number(0))
    size = op.Add(total, nothing)
    entry = op.Add(op.Gather(op.Sub(offsets, count), ids), position)
    table = _table(op.Where(picked, entry, size), size, op.Size(ids))
    place = op.Min(op.Max(entry, _number(0)), op.Sub(size, _number(1)))
    return op.Div(table, _top_k(code)), op.Gather(ids, table), place, offsets


def _plan_dense(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, ...]:
    top_k, end, flat = _sizes(code)[-1], _numbers(1), _numbers(-1)
    assert top_k is not None, "k is fixed"
    ids = op.Reshape(slot_expert, _numbers(-1, top_k))
    entry = op.Range(_number(0), op.Squeeze(op.Shape(ids, start=0, end=1)), _number(1))
    place = op.Reshape(op.Add(op.Mul(ids, op.Size(entry)), op.Unsqueeze(entry, end)), flat)
    experts = op.Unsqueeze(_numbers(*range(num_experts)), end)
    every, owner = (op.Add(op.Mul(a, _number(0)), b) for a, b in ((experts, entry), (entry, experts)))
    return op.Reshape(every, flat), op.Reshape(owner, flat), place


def _grouped_linear(x: Value, weight: Value, bias: Value | None, offsets: Value) -> Value:
    """One product an expert, of the rows that it has."""
    experts = _sizes(weight)[0]
    assert experts is not None, "the number of experts is fixed"
    ends = op.Split(offsets, axis=0, num_outputs=experts) if experts > 1 else [offsets]
    parts, start = [], _numbers(0)
    for index, end in enumerate(ends):
        own = [op.Gather(part, _number(index), axis=0) for part in (weight, bias) if part is not None]
        parts.append(op.Gemm(op.Slice(x, start, end, _numbers(0)), *own, transB=1))
        start = end
    return op.Concat(*parts, axis=0)


def _plan_padded(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, Value, Value]:
    flat, experts = _numbers(-1), _numbers(*range(num_experts))
    picked, ids, position, before = _positions(code, slot_expert, num_experts)
    branches = op.Size(ids)
    index = _count(branches, op.ReduceMax(before, keepdims=0))
    width = op.Size(index)
    size = op.Mul(width, _number(num_experts))
    entry = op.Add(op.Mul(ids, width), position)
    place = op.Min(op.Max(entry, _number(0)), op.Sub(size, _number(1)))
    table = _table(op.Where(picked, entry, size), size, branches)
    owner = op.Reshape(op.Add(op.Unsqueeze(experts, _numbers(1)), op.Mul(index, _number(0))), flat)
    return op.Div(table, _top_k(code)), owner, place


def _update_activation(activation: Value, expert: Value, beta: float) -> Value:
    experts = _sizes(activation)[1]
    assert experts is not None, "the number of experts is fixed"
    every = op.Reshape(_numbers(*range(experts)), _numbers(experts, 1, 1))
    dtype = activation.dtype
    mine = op.Cast(op.Equal(op.Unsqueeze(expert, _numbers(1)), every), to=dtype)  # [B, E, T, k]
    chosen = op.ReduceMax(mine, _numbers(-1), keepdims=0)
    return op.Add(op.Mul(activation, _real(beta, dtype)), op.Mul(chosen, _real(1.0 - beta, dtype)))


def _expert_threshold(activation: Value, tau0: float, alpha: float, entropy_norm: str) -> Value:
    last, real = _numbers(-1), partial(_real, dtype=activation.dtype)
    share = _share(activation)
    terms = op.Mul(share, op.Log(op.Max(share, real(_TINY))))
    entropy = op.Neg(op.ReduceSum(terms, last, keepdims=0))
    if entropy_norm == "log":
        scaled = _of_tokens(entropy, _tokens_last(activation), real)
    else:
        low, high = (reduce(entropy, last, keepdims=1) for reduce in (op.ReduceMin, op.ReduceMax))
        span = op.Sub(high, low)
        alike = op.LessOrEqual(span, real(ALIKE_ENTROPIES))
        scaled = op.Where(alike, real(0.5), op.Div(op.Sub(entropy, low), op.Where(alike, real(1.0), span)))
    centred = op.Sub(op.Mul(scaled, real(2.0)), real(1.0))
    return op.Mul(op.Add(op.Mul(centred, real(alpha)), real(1.0)), real(tau0))


def _of_tokens(entropy: Value, tokens: int, real: Callable[[float], Value]) -> Value:
    """Entropy over its largest, ``log T``."""
    if tokens > 1:
        return op.Div(entropy, real(math.log(tokens)))
    return op.Expand(real(0.5), op.Shape(entropy))


def _tokens_last(activation: Value) -> int:
    tokens = _sizes(activation)[-1]
    assert tokens is not None, "the number of tokens is fixed"
    return tokens


def _share(value: Value) -> Value:
    """Of its sum over the last axis, 0 where that is 0."""
    real = partial(_real, dtype=value.dtype)
    total = op.ReduceSum(value, _numbers(-1), keepdims=1)
    nothing = op.Equal(total, real(0.0))
    return op.Where(nothing, real(0.0), op.Div(value, op.Where(nothing, real(1.0), total)))


def _decide(
    expert: Value,
    weight: Value,
    cached_expert: Value,
    cached_weight: Value,
    cached_norm: Value,
    threshold: Value,
    lambda1: float,
    lambda2: float,
    kind: str,
    code_dtype: Any,
) -> tuple[Value, Value, Value, Value]:
    last, before_last, one = _numbers(-1), _numbers(-2), _number(1)
    same = op.Cast(op.Equal(op.Unsqueeze(expert, last), op.Unsqueeze(cached_expert, before_last)), to=_INT64)
    matched = op.ReduceMax(same, last, keepdims=0)
    # The i-th unmatched branch takes the i-th free slot: the first at which the count of free slots reaches i.
    branch_rank = op.CumSum(op.Sub(one, matched), _number(-1))
    slot_rank = op.CumSum(op.Sub(one, op.ReduceMax(same, before_last, keepdims=0)), _number(-1))
    offered = op.Cast(op.Equal(op.Unsqueeze(branch_rank, last), op.Unsqueeze(slot_rank, before_last)), to=_INT64)
    own, free = (op.ArgMax(part, axis=-1, keepdims=0) for part in (same, offered))
    slot = op.Where(op.Cast(matched, to=_BOOL), own, free)
    dtype = _wide(weight.dtype)
    weight = _share(_as(weight, dtype)) if kind == "share" else _as(weight, dtype)
    slot_expert, slot_weight, slot_matched = (_to_slots(part, slot) for part in (expert, weight, matched))
    change = op.Abs(op.Sub(slot_weight, cached_weight))
    score = op.Add(
        op.Add(slot_weight, op.Mul(change, _real(lambda1, dtype))),
        op.Mul(_share(cached_norm), _real(lambda2, dtype)),
    )
    flat = op.Reshape(slot_expert, _numbers(0, -1))
    limit = op.Reshape(op.GatherElements(threshold, flat, axis=1), op.Shape(slot_expert))
    above = op.Cast(op.Greater(score, limit), to=_INT64)
    return slot, slot_expert, slot_weight, op.Where(op.Cast(slot_matched, to=_BOOL), above, _number(UNMATCHED))


def _to_slots(value: Value, slot: Value) -> Value:
    """Slots are a permutation, so nothing of the scattered-into value is left."""
    return op.ScatterElements(value, slot, value, axis=-1)


def _forced_code(code: Value, force: Value) -> Value:
    return op.Where(op.And(force, op.Equal(code, _number(REUSED))), _number(RECOMPUTED), code)


def _token_mask(code: Value) -> Value:
    return op.Greater(op.ReduceMax(code, _numbers(-1), keepdims=0), _number(REUSED))


def _combine_slots(feature: Value, weight: Value) -> Value:
    dtype = feature.dtype if feature.dtype == weight.dtype else _FLOAT
    rows_of_weights = op.Unsqueeze(_as(weight, dtype), _numbers(2))
    combined = op.Squeeze(op.MatMul(rows_of_weights, _as(feature, dtype)), _numbers(2))
    return combined if dtype == feature.dtype else op.Cast(combined, to=feature.dtype)


def _gather_rows(x: Value, row: Value, batch_axis: int, token_axis: int) -> Value:
    return op.Unsqueeze(op.GatherND(x, _places(row, _tokens(x))), _numbers(1))


def _gather_samples(x: Value, row: Value, tokens: int, batch_axis: int) -> Value:
    return op.Gather(x, op.Div(row, _number(tokens)), axis=batch_axis)


def _gather_tokens(x: Value, row: Value, tokens: int, batch_axis: int, token_axis: int) -> Value:
    order = list(range(len(x.shape)))
    order[batch_axis], order[token_axis] = order[token_axis], order[batch_axis]
    return op.Transpose(op.Gather(x, op.Mod(row, _number(tokens)), axis=token_axis), perm=order)


def _stable_sort(values: Value, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """torch has no translation; ONNX's TopK puts the lower index first among equals."""
    size = op.Gather(op.Shape(values), _numbers(dim), axis=0)
    return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


_OF_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    bounded.select_rows: _select_rows,
    bounded.valid_code: _valid_code,
    bounded.write_rows: _write_rows,
    bounded.write_branches: _write_branches,
    bounded.attention_rows: _attention_rows,
    bounded.take_branches: _take_branches,
    bounded.plan_padded: _plan_padded,
    bounded.plan_grouped: _plan_grouped,
    bounded.plan_dense: _plan_dense,
    bounded.update_activation: _update_activation,
    branch.expert_threshold: _expert_threshold,
    branch.decide: _decide,
    slots.forced_code: _forced_code,
    slots.token_mask: _token_mask,
    dispatch.combine_slots: _combine_slots,
    rows.gather_rows: _gather_rows,
    rows.gather_samples: _gather_samples,
    rows.gather_tokens: _gather_tokens,
}


def translations() -> dict[Any, Callable[..., Any]]:
    """Operation -> its translation, for `torch.onnx.export`."""
    whole = {WHOLE[function]: translation for function, translation in _OF_FUNCTIONS.items()}
    return whole | {torch.ops.aten.sort.stable: _stable_sort, grouped_linear._opoverload: _grouped_linear}
