"""Decisions over branches: match, score, threshold.

    expert [B, T, k]  -->  [k, R]  -->  what equals what [k, k, R]  -->  code [B, T, k]

Within, branches and slots are in front and all tokens behind: broadcasting along an axis of k entries at the end would
give a runtime on a CPU R short loops for one long one.
"""

import math
from functools import partial
from typing import Any

import numpy
import onnx_ir

from moeca_fx.export.onnx.values import (
    FLOAT,
    INT64,
    Value,
    as_dtype,
    number,
    numbers,
    one_hot,
    op,
    real,
    sizes,
    wide,
    with_axes,
)
from moeca_fx.ops.slots import REUSED, UNMATCHED
from moeca_fx.policies.branch import ALIKE_ENTROPIES

_TINY = 1e-37  # its logarithm times zero is zero
_HUGE = 1e38  # infinity over it is infinity


def decide(
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
    """See `policies.branch.decide`; whatever `code_dtype` says, codes are int64."""
    front, behind = numbers(0), numbers(1)
    dtype = wide(weight.dtype)
    ids, held = _tokens_last(expert), _tokens_last(cached_expert)
    # [branch, slot, R]: a branch takes the slot of its expert, or the i-th of the others the i-th free slot.
    same = op.Equal(op.Unsqueeze(ids, behind), op.Unsqueeze(held, front))
    counted, one = op.Cast(same, to=INT64), number(1)
    matched, slot_matched = (op.ReduceMax(counted, axis, keepdims=0) for axis in (behind, front))
    new, free = (op.Sub(one, taken) for taken in (matched, slot_matched))
    branch_rank, slot_rank = (op.Mul(op.CumSum(part, number(0)), part) for part in (new, free))  # from 1, 0: none
    slot_rank = op.Sub(slot_rank, slot_matched)  # -1: none, which no branch's is
    offered = op.Equal(op.Unsqueeze(branch_rank, behind), op.Unsqueeze(slot_rank, front))
    takes = op.Or(same, offered)
    slot = op.ArgMax(op.Cast(takes, to=INT64), axis=1, keepdims=0)
    weights = _tokens_last(as_dtype(weight, dtype))
    weights = _share(weights, dtype, axis=0) if kind == "share" else weights
    slot_expert = op.ReduceMax(op.Where(takes, op.Unsqueeze(ids, behind), number(-1)), front, keepdims=0)
    slot_weight = op.ReduceSum(op.Where(takes, op.Unsqueeze(weights, behind), real(0.0, dtype)), front, keepdims=0)
    slot, slot_expert, slot_weight_back = (_back(part, expert) for part in (slot, slot_expert, slot_weight))
    change = op.Abs(op.Sub(slot_weight, _tokens_last(cached_weight)))
    score = op.Add(
        op.Add(slot_weight, op.Mul(change, real(lambda1, dtype))),
        op.Mul(_share_of_norms(_tokens_last(cached_norm), dtype), real(lambda2, dtype)),
    )
    tokens, top_k = _fixed(expert)
    limit = op.GatherElements(threshold, op.Reshape(slot_expert, numbers(-1, tokens * top_k)), axis=1)
    limit = _tokens_last(limit, top_k)
    above = op.Cast(op.Greater(score, limit), to=INT64)
    code = op.Where(op.Equal(slot_matched, one), above, number(UNMATCHED))
    return slot, slot_expert, slot_weight_back, _back(code, expert)


def part_of_norms(norm: Value, lambda2: float) -> Value:
    """See `ops.slot_decisions.part_of_norms`; norms are never negative."""
    return op.Mul(_part_of_sum(norm, norm.dtype), real(lambda2, norm.dtype))


def refreshed_tokens(
    expert: Value,
    weight: Value,
    cached_expert: Value,
    cached_weight: Value,
    part: Value,
    threshold: Value,
    lambda1: float,
    kind: str,
) -> tuple[Value, Value]:
    """See `ops.slot_decisions.refreshed_tokens`; weights are infinite where nothing matches, and so is the score."""
    tokens, top_k = _fixed(expert)
    same = op.Equal(_branches(expert), _slots(cached_expert))
    offered = op.Where(same, _branches(weight), real(math.inf, weight.dtype))
    by_slot = _in_slots(op.ReduceMin(offered, numbers(0), keepdims=0), weight)
    held = op.Max(cached_expert, with_axes(3, 0))  # an empty slot matches nothing
    score = _score(_read_weight(by_slot, weight, kind), cached_weight, part, lambda1)
    limit = _limit(threshold, held, tokens, top_k)
    over = op.ReduceMax(op.Sub(score, limit), numbers(2), keepdims=0)
    return op.Greater(over, op.Constant(value=onnx_ir.tensor([[0.0]], dtype=wide(weight.dtype)))), by_slot


def decide_slots(
    expert: Value,
    weight: Value,
    cached_expert: Value,
    cached_weight: Value,
    part: Value,
    threshold: Value,
    lambda1: float,
    kind: str,
) -> tuple[Value, Value, Value, Value]:
    """See `ops.slot_decisions.decide_slots`."""
    tokens, top_k = _fixed(expert)
    ids = _branches(expert)
    takes = _pair(op.Equal(ids, _slots(cached_expert)), top_k)
    front = numbers(0)
    slot_expert = _in_slots(op.ReduceMax(op.Where(takes, ids, number(-1)), front, keepdims=0), expert)
    taken = op.Where(takes, _branches(weight), real(0.0, weight.dtype))
    by_slot = _in_slots(op.ReduceSum(taken, front, keepdims=0), weight)
    slot_weight = _read_weight(by_slot, weight, kind)
    score = _score(slot_weight, cached_weight, part, lambda1)
    above = op.Cast(op.Greater(score, _limit(threshold, slot_expert, tokens, top_k)), to=INT64)
    code = op.Where(op.Equal(slot_expert, cached_expert), above, with_axes(3, UNMATCHED))
    return by_slot, slot_expert, slot_weight, code


def _branches(value: Value) -> Value:
    """[B, T, k] -> [k, 1, R]."""
    return op.Transpose(op.Reshape(value, numbers(-1, 1, _fixed(value)[1])), perm=[2, 1, 0])


def _slots(value: Value) -> Value:
    """[B, T, k] -> [1, k, R]."""
    return op.Transpose(op.Reshape(value, numbers(1, -1, _fixed(value)[1])), perm=[0, 2, 1])


def _pair(same: Value, top_k: int) -> Value:
    """[k branch, k slot, R]: the slot of the same expert, or the i-th free slot for the i-th unmatched branch.

    Ranks of both are sums over what is the same, so one product gives how far they differ; k**4 numbers a token are few
    beside an expert's. Matched branches and taken slots are shifted by so much that they equal nothing. All are small
    integers, exact in TF32 too.
    """
    lower, unit = numpy.tri(top_k), numpy.eye(top_k)
    shift, ones = top_k + 1, numpy.ones((1, top_k))
    branch, slot = shift * unit - lower, 3 * shift * unit - lower
    weights = numpy.kron(branch, ones).repeat(top_k, 0) - numpy.tile(numpy.kron(ones, slot), (top_k, 1))
    places = numpy.subtract.outer(numpy.arange(top_k), numpy.arange(top_k)).reshape(-1, 1)
    constants = (op.Constant(value=onnx_ir.tensor(part.astype(numpy.float32))) for part in (weights, places))
    weights, places = constants
    flat = op.Reshape(op.Cast(same, to=FLOAT), numbers(top_k * top_k, -1))
    apart = op.Gemm(weights, flat, places)
    return op.Or(same, op.Reshape(op.Equal(apart, real(0.0, FLOAT)), numbers(top_k, top_k, -1)))


def _read_weight(by_slot: Value, weight: Value, kind: str) -> Value:
    """Weights [B, T, k] in slots as the score reads them."""
    dtype = wide(weight.dtype)
    by_slot = op.Cast(by_slot, to=dtype) if dtype != weight.dtype else by_slot
    if kind != "share":
        return by_slot
    total = op.ReduceSum(as_dtype(weight, dtype), numbers(2), keepdims=1)
    return op.Div(by_slot, op.Where(op.Equal(total, real(0.0, dtype)), real(_HUGE, dtype), total))


def _score(weight_now: Value, weight_then: Value, part: Value, lambda1: float) -> Value:
    """Eq. 9; a weight of now may be infinite."""
    if not lambda1:
        return op.Add(weight_now, part)
    change = op.Abs(op.Sub(weight_now, weight_then))
    return op.Add(op.Add(weight_now, op.Mul(change, real(lambda1, weight_then.dtype))), part)


def _limit(threshold: Value, expert: Value, tokens: int, top_k: int) -> Value:
    """Thresholds [B, E] of experts [B, T, k]."""
    found = op.GatherElements(threshold, op.Reshape(expert, numbers(-1, tokens * top_k)), axis=1)
    return op.Reshape(found, numbers(-1, tokens, top_k))


def to_slots(value: Value, slot: Value) -> Value:
    """Slots are a permutation, so nothing of the scattered-into value is left."""
    return op.ScatterElements(value, slot, value, axis=-1)


def expert_threshold(activation: Value, tau0: float, alpha: float, entropy_norm: str) -> Value:
    """See `policies.branch.expert_threshold`."""
    dtype = activation.dtype
    of = partial(real, dtype=dtype)
    tokens = _tokens(activation)
    if entropy_norm == "log" and tokens == 1:
        return op.Expand(of(tau0), op.Shape(activation, start=0, end=2))
    share = _part_of_sum(activation, dtype)
    terms = op.Mul(share, op.Log(op.Max(share, of(_TINY))))
    total = op.ReduceSum(terms, numbers(2), keepdims=0)  # minus the entropy, [B, E]
    if entropy_norm == "log":
        return op.Add(op.Mul(total, of(-2 * alpha * tau0 / math.log(tokens))), of((1 - alpha) * tau0))
    entropy = op.Neg(total)
    low, high = (reduce(entropy, numbers(1), keepdims=1) for reduce in (op.ReduceMin, op.ReduceMax))
    span = op.Sub(high, low)
    alike = op.LessOrEqual(span, of(ALIKE_ENTROPIES))
    scaled = op.Where(alike, of(0.5), op.Div(op.Sub(entropy, low), op.Where(alike, of(1.0), span)))
    centred = op.Sub(op.Mul(scaled, of(2.0)), of(1.0))
    return op.Mul(op.Add(op.Mul(centred, of(alpha)), of(1.0)), of(tau0))


def update_activation(activation: Value, expert: Value, beta: float) -> Value:
    """See `ops.bounded.update_activation`."""
    experts, dtype = sizes(activation)[1], activation.dtype
    assert experts is not None, "the number of experts is fixed"
    mine = op.Gather(one_hot(experts, dtype, value=1.0 - beta), expert, axis=0)  # [B, T, k, E]
    chosen = op.Transpose(op.ReduceMax(mine, numbers(2), keepdims=0), perm=[0, 2, 1])
    return op.Add(op.Mul(activation, real(beta, dtype)), chosen)


def forced_code(code: Value, force: Value) -> Value:
    """See `ops.slots.forced_code`."""
    flag = op.Cast(op.Reshape(force, numbers(*[1] * len(code.shape))), to=code.dtype)
    return op.Max(code, flag)  # RECOMPUTED is one more than REUSED


def token_mask(code: Value) -> Value:
    """See `ops.slots.token_mask`."""
    last = len(code.shape) - 1
    return op.Greater(op.ReduceMax(code, numbers(last), keepdims=0), with_axes(last, REUSED))


def _fixed(value: Value) -> tuple[int, int]:
    """T and k of a value [B, T, k]."""
    tokens, top_k = sizes(value)[1:]
    assert tokens is not None and top_k is not None, "the numbers of tokens and of branches are fixed"
    return tokens, top_k


def _tokens_last(value: Value, top_k: int | None = None) -> Value:
    """[B, T, k] -> [k, R]."""
    return op.Transpose(op.Reshape(value, numbers(-1, top_k or _fixed(value)[1])), perm=[1, 0])


def _back(value: Value, like: Value) -> Value:
    """[k, R] -> [B, T, k] as `like`."""
    return op.Reshape(op.Transpose(value, perm=[1, 0]), numbers(-1, *_fixed(like)))


def _in_slots(value: Value, like: Value) -> Value:
    """`_back` for a value of the dtype of `like`; its rows are known to be rows, so that views of them merge."""
    rows = op.Transpose(value, perm=[1, 0])
    rows.dtype, rows.shape = like.dtype, onnx_ir.Shape([None, _fixed(like)[1]])
    return op.Reshape(rows, numbers(-1, *_fixed(like)))


def _tokens(activation: Value) -> int:
    tokens = sizes(activation)[-1]
    assert tokens is not None, "the number of tokens is fixed"
    return tokens


def _share(value: Value, dtype: Any, axis: int) -> Value:
    """Of its sum over an axis, 0 where that is 0: what is divided by infinity."""
    total = op.ReduceSum(value, numbers(axis), keepdims=0)
    total = op.Where(op.Equal(total, real(0.0, dtype)), real(math.inf, dtype), total)
    return op.Div(value, op.Unsqueeze(total, numbers(axis)))


def _part_of_sum(value: Value, dtype: Any) -> Value:
    """What is never negative over its sum over the last axis, 0 where that is 0."""
    total = op.ReduceSum(value, numbers(len(value.shape) - 1), keepdims=1)
    return op.Div(value, op.Max(total, real(_TINY, dtype)))


def _share_of_norms(value: Value, dtype: Any) -> Value:
    """The same [k, R], over its first axis, of what is never negative."""
    total = op.Max(op.ReduceSum(value, numbers(0), keepdims=0), real(_TINY, dtype))
    return op.Div(value, op.Unsqueeze(total, numbers(0)))
