"""Tables of branches: what is in them, and results by entry, in the order of a decision or written into a cache."""

from moeca_fx.export.onnx.values import FLOAT, NARROW, Value, as_dtype, number, numbers, op, places, sizes
from moeca_fx.ops.slots import REUSED

NORM_OF = "norm of"
"""Under this a norm has in memory what it is the norm of: a table's is computed of the entries that are in use."""


def table_of(target: Value, size: Value, branches: Value) -> Value:
    """Branch of each of `size` entries; `target` [R] of what has none is `size`."""
    nothing = op.Expand(number(0), op.Reshape(op.Add(size, number(1)), numbers(1)))
    table = op.ScatterElements(nothing, target, op.Range(number(0), branches, number(1)), axis=0)
    return op.Slice(table, numbers(0), numbers(-1), numbers(0))


def take_branches(values: Value, code: Value, place: Value) -> Value:
    """See `ops.bounded.take_branches`."""
    return op.Reshape(op.Gather(values, place), numbers(-1, *top_k_and_widths(code, values)))


def top_k_and_widths(code: Value, values: Value) -> list[int]:
    """k of a code [.., k] and the sizes of a row of values."""
    found = [sizes(code)[-1], *sizes(values)[1:]]
    assert None not in found, "k and widths are fixed"
    return [size or 0 for size in found]


def feature_norm(feature: Value) -> Value:
    """Not ReduceL2, which onnxruntime computes in several times the time of these three."""
    wide = as_dtype(feature, FLOAT) if feature.dtype in NARROW else feature
    norm = op.Sqrt(op.ReduceSum(op.Mul(wide, wide), numbers(len(feature.shape) - 1), keepdims=0))
    norm.meta[NORM_OF] = feature
    return norm


def write_branches(cache: Value, fresh: Value, code: Value, row: Value | None) -> Value:
    """See `ops.bounded.write_branches`."""
    tokens, top_k, *rest = (size or -1 for size in sizes(cache)[1:])
    fresh, picked = as_dtype(fresh, cache.dtype), op.Greater(code, number(REUSED))
    if row is None:
        fresh = op.Reshape(fresh, numbers(-1, tokens, top_k, *rest))
        return op.Where(op.Reshape(picked, numbers(-1, tokens, top_k, *(1 for _ in rest))), fresh, cache)
    picked = op.Reshape(picked, numbers(-1, top_k, *(1 for _ in rest)))
    where = places(row, tokens)
    return op.ScatterND(cache, where, op.Where(picked, fresh, op.GatherND(cache, where)))
