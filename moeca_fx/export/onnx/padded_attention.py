"""Attention of a list of rows, padded to the fullest sample: what exact and bounded lists have in common."""

import math

from moeca_fx.export.onnx.values import INT64, Value, for_every_head, number, numbers, op, real, sizes


def rows_by_sample(mask: Value) -> tuple[Value, Value]:
    """How many rows of a mask [B, T] each sample has, and how many come before its first: [B, 1] each."""
    count = op.ReduceSum(op.Cast(mask, to=INT64), numbers(1), keepdims=1)
    return count, op.Sub(op.CumSum(count, number(0)), count)


def count_padded(mask: Value) -> Value:
    """See `ops.slots.count_padded`."""
    count, _ = rows_by_sample(mask)
    return op.Mul(op.ReduceMax(count, keepdims=0), op.Squeeze(op.Shape(mask, start=0, end=1), numbers(0)))


def attend(query: Value, key: Value, value: Value, local: Value, scale: float | None) -> Value:
    """Attention of the rows `local` [B, S] of a list: [B, S, h, d_v]."""
    heads, width = sizes(query)[1], sizes(query)[-1]
    assert heads is not None and width is not None, "heads and their width are fixed"
    padded = op.Transpose(op.Gather(query, local), perm=[0, 2, 1, 3])  # [B, h, S, d]
    factor = real(1 / math.sqrt(width) if scale is None else scale, query.dtype)
    key, value = (for_every_head(part, heads) for part in (key, value))
    # In two steps, of which onnxruntime makes the second a flag of the product.
    turned = op.Transpose(op.Transpose(key, perm=[0, 2, 1, 3]), perm=[0, 1, 3, 2])
    scores = op.MatMul(op.Mul(padded, factor), turned)
    out = op.MatMul(op.Softmax(scores, axis=-1), op.Transpose(value, perm=[0, 2, 1, 3]))
    return op.Transpose(out, perm=[0, 2, 1, 3])
