"""What the operations of `whole` become in ONNX: the same formulas in fewer nodes than torch's own translation.

Every function takes and gives values of onnxscript. No scatter that adds, so that TensorRT takes them; what lists rows
is in `bounded_lists` and `exact_lists`. Shapes are those of the functions that the operations stand for.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moeca_fx.export.onnx.bounded_lists import BOUNDED_LISTS
from moeca_fx.export.onnx.exact_lists import EXACT_LISTS
from moeca_fx.export.onnx.given_lengths import GIVEN_LISTS
from moeca_fx.export.onnx.tables import take_branches, write_branches
from moeca_fx.export.onnx.values import (
    FLOAT,
    INT64,
    Value,
    as_dtype,
    number,
    numbers,
    op,
    places,
    real,
    sizes,
    tokens_of,
    wide,
)
from moeca_fx.export.onnx.whole import WHOLE, Lengths
from moeca_fx.ops import bounded, dispatch, rows, slots
from moeca_fx.ops.grouped_linear import grouped_linear
from moeca_fx.ops.slots import RECOMPUTED, REUSED, UNMATCHED
from moeca_fx.policies import branch
from moeca_fx.policies.branch import ALIKE_ENTROPIES

_TINY = 1e-37  # its logarithm times zero is zero


def _plan_dense(code: Value, slot_expert: Value, num_experts: int) -> tuple[Value, ...]:
    top_k, end, flat = sizes(code)[-1], numbers(1), numbers(-1)
    assert top_k is not None, "k is fixed"
    ids = op.Reshape(slot_expert, numbers(-1, top_k))
    entry = op.Range(number(0), op.Squeeze(op.Shape(ids, start=0, end=1)), number(1))
    place = op.Reshape(op.Add(op.Mul(ids, op.Size(entry)), op.Unsqueeze(entry, end)), flat)
    experts = op.Unsqueeze(numbers(*range(num_experts)), end)
    every, owner = (op.Add(op.Mul(a, number(0)), b) for a, b in ((experts, entry), (entry, experts)))
    return op.Reshape(every, flat), op.Reshape(owner, flat), place


def _grouped_linear(x: Value, weight: Value, bias: Value | None, offsets: Value) -> Value:
    """One product an expert, of the rows that it has."""
    experts = sizes(weight)[0]
    assert experts is not None, "the number of experts is fixed"
    if experts == 1:
        groups = [x]
    else:
        starts = op.Concat(numbers(0), op.Slice(offsets, numbers(0), numbers(-1), numbers(0)), axis=0)
        groups = op.Split(x, op.Sub(offsets, starts), axis=0, num_outputs=experts)  # `tidy` drops one of the two
    parts = []
    for index, group in enumerate(groups):
        own = [op.Gather(part, number(index), axis=0) for part in (weight, bias) if part is not None]
        parts.append(op.Gemm(group, *own, transB=1))
    return op.Concat(*parts, axis=0)


def _update_activation(activation: Value, expert: Value, beta: float) -> Value:
    experts = sizes(activation)[1]
    assert experts is not None, "the number of experts is fixed"
    every = op.Reshape(numbers(*range(experts)), numbers(experts, 1, 1))
    dtype = activation.dtype
    mine = op.Cast(op.Equal(op.Unsqueeze(expert, numbers(1)), every), to=dtype)  # [B, E, T, k]
    chosen = op.ReduceMax(mine, numbers(3), keepdims=0)
    return op.Add(op.Mul(activation, real(beta, dtype)), op.Mul(chosen, real(1.0 - beta, dtype)))


def _tokens_last(activation: Value) -> int:
    tokens = sizes(activation)[-1]
    assert tokens is not None, "the number of tokens is fixed"
    return tokens


def _expert_threshold(activation: Value, tau0: float, alpha: float, entropy_norm: str) -> Value:
    of = partial(real, dtype=activation.dtype)
    share = _share(activation)
    terms = op.Mul(share, op.Log(op.Max(share, of(_TINY))))
    entropy = op.Neg(op.ReduceSum(terms, numbers(2), keepdims=0))  # [B, E]
    if entropy_norm == "log":
        scaled = _of_tokens(entropy, _tokens_last(activation), of)
    else:
        low, high = (reduce(entropy, numbers(1), keepdims=1) for reduce in (op.ReduceMin, op.ReduceMax))
        span = op.Sub(high, low)
        alike = op.LessOrEqual(span, of(ALIKE_ENTROPIES))
        scaled = op.Where(alike, of(0.5), op.Div(op.Sub(entropy, low), op.Where(alike, of(1.0), span)))
    centred = op.Sub(op.Mul(scaled, of(2.0)), of(1.0))
    return op.Mul(op.Add(op.Mul(centred, of(alpha)), of(1.0)), of(tau0))


def _of_tokens(entropy: Value, tokens: int, of: Callable[[float], Value]) -> Value:
    """Entropy over its largest, ``log T``."""
    if tokens > 1:
        return op.Div(entropy, of(math.log(tokens)))
    return op.Expand(of(0.5), op.Shape(entropy))


def _share(value: Value) -> Value:
    """Of its sum over the last axis, 0 where that is 0."""
    of = partial(real, dtype=value.dtype)
    total = op.ReduceSum(value, numbers(len(value.shape) - 1), keepdims=1)
    nothing = op.Equal(total, of(0.0))
    return op.Where(nothing, of(0.0), op.Div(value, op.Where(nothing, of(1.0), total)))


def _share_of_norms(value: Value) -> Value:
    """The same of what is never negative."""
    total = op.ReduceSum(value, numbers(len(value.shape) - 1), keepdims=1)
    return op.Div(value, op.Max(total, real(_TINY, value.dtype)))


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
    behind = len(expert.shape)  # axes from the front, see `exact_lists`: [.., branch, slot]
    of_slots, of_branches = numbers(behind), numbers(behind - 1)
    same = op.Equal(op.Unsqueeze(expert, of_slots), op.Unsqueeze(cached_expert, of_branches))
    counted, one = op.Cast(same, to=INT64), number(1)
    matched, slot_matched = (op.ReduceMax(counted, axis, keepdims=0) for axis in (of_slots, of_branches))
    # The i-th unmatched branch takes the i-th free slot: the first at which the count of free slots reaches i.
    branch_rank, slot_rank = (op.CumSum(op.Sub(one, taken), number(-1)) for taken in (matched, slot_matched))
    offered = op.Equal(op.Unsqueeze(branch_rank, of_slots), op.Unsqueeze(slot_rank, of_branches))
    wish = op.Where(same, number(2), op.Cast(offered, to=INT64))  # its own slot rather than an offered one
    slot = op.ArgMax(wish, axis=behind, keepdims=0)
    dtype = wide(weight.dtype)
    weight = _share(as_dtype(weight, dtype)) if kind == "share" else as_dtype(weight, dtype)
    slot_expert, slot_weight = (_to_slots(part, slot) for part in (expert, weight))
    change = op.Abs(op.Sub(slot_weight, cached_weight))
    score = op.Add(
        op.Add(slot_weight, op.Mul(change, real(lambda1, dtype))),
        op.Mul(_share_of_norms(cached_norm), real(lambda2, dtype)),
    )
    limit = op.GatherND(threshold, op.Unsqueeze(slot_expert, of_slots), batch_dims=1)
    above = op.Cast(op.Greater(score, limit), to=INT64)
    return slot, slot_expert, slot_weight, op.Where(op.Equal(slot_matched, one), above, number(UNMATCHED))


def _to_slots(value: Value, slot: Value) -> Value:
    """Slots are a permutation, so nothing of the scattered-into value is left."""
    return op.ScatterElements(value, slot, value, axis=-1)


def _forced_code(code: Value, force: Value) -> Value:
    return op.Where(op.And(force, op.Equal(code, number(REUSED))), number(RECOMPUTED), code)


def _token_mask(code: Value) -> Value:
    return op.Greater(op.ReduceMax(code, numbers(len(code.shape) - 1), keepdims=0), number(REUSED))


def _combine_slots(feature: Value, weight: Value) -> Value:
    dtype = feature.dtype if feature.dtype == weight.dtype else FLOAT
    rows_of_weights = op.Unsqueeze(as_dtype(weight, dtype), numbers(2))
    combined = op.Squeeze(op.MatMul(rows_of_weights, as_dtype(feature, dtype)), numbers(2))
    return combined if dtype == feature.dtype else op.Cast(combined, to=feature.dtype)


def _gather_rows(x: Value, row: Value, batch_axis: int, token_axis: int) -> Value:
    return op.Unsqueeze(op.GatherND(x, places(row, tokens_of(x))), numbers(1))


def _gather_samples(x: Value, row: Value, tokens: int, batch_axis: int) -> Value:
    return op.Gather(x, op.Div(row, number(tokens)), axis=batch_axis)


def _gather_tokens(x: Value, row: Value, tokens: int, batch_axis: int, token_axis: int) -> Value:
    order = list(range(len(x.shape)))
    order[batch_axis], order[token_axis] = order[token_axis], order[batch_axis]
    return op.Transpose(op.Gather(x, op.Mod(row, number(tokens)), axis=token_axis), perm=order)


def _stable_sort(values: Value, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """torch has no translation; ONNX's TopK puts the lower index first among equals."""
    size = op.Gather(op.Shape(values), numbers(dim), axis=0)
    return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


_OF_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    bounded.write_branches: write_branches,
    bounded.take_branches: take_branches,
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


_LISTS = {"range": BOUNDED_LISTS, "nonzero": EXACT_LISTS, "input": GIVEN_LISTS}


def translations(lengths: Lengths = "range") -> dict[Any, Callable[..., Any]]:
    """Operation -> its translation, for `torch.onnx.export`."""
    whole = {WHOLE[function]: translation for function, translation in (_OF_FUNCTIONS | _LISTS[lengths]).items()}
    return whole | {torch.ops.aten.sort.stable: _stable_sort, grouped_linear._opoverload: _grouped_linear}
