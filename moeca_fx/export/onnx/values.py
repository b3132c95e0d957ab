"""Values of onnxscript that translations are written with: constants, dtypes, sizes, flat rows. Integers are int64."""

from typing import Any

import numpy
import onnx_ir
from onnxscript import opset18

op: Any = opset18
Value = Any
INT64, FLOAT = onnx_ir.DataType.INT64, onnx_ir.DataType.FLOAT
BOOL = onnx_ir.DataType.BOOL
NARROW = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)


def number(value: int | float) -> Value:
    """A constant []."""
    return op.Constant(value_float=value) if isinstance(value, float) else op.Constant(value_int=value)


def numbers(*values: int) -> Value:
    """A constant [n] of int64."""
    return op.Constant(value_ints=list(values))


def real(value: float, dtype: onnx_ir.DataType) -> Value:
    """A number of this dtype."""
    return op.Constant(value=onnx_ir.tensor(value, dtype=dtype))


def with_axes(rank: int, value: int) -> Value:
    """A constant [1, .., 1] of int64.

    onnxruntime's CPU kernels take one loop then; with a constant [] they take one for each entry of the axes in front
    of an axis of 1, such as that of rows [M, 1, k].
    """
    return op.Constant(value=onnx_ir.tensor(numpy.full([1] * rank, value), dtype=INT64))


def one_hot(size: int, dtype: onnx_ir.DataType, rest: int = 0, value: float = 1.0) -> Value:
    """`value` times the unit matrix [size + rest, size].

    Its rows cost less than comparisons with all numbers, those behind are 0."""
    return op.Constant(
        value=onnx_ir.tensor(numpy.eye(size + rest, size, dtype=dtype.numpy()) * dtype.numpy().type(value), dtype=dtype)
    )


def as_dtype(value: Value, dtype: onnx_ir.DataType) -> Value:
    """A value in this dtype, its sizes known as before: a cast inside a translation has none of its own."""
    if value.dtype == dtype:
        return value
    made = op.Cast(value, to=dtype)
    made.dtype, made.shape = dtype, value.shape
    return made


def wide(dtype: onnx_ir.DataType) -> onnx_ir.DataType:
    """At least fp32."""
    return FLOAT if dtype in NARROW else dtype


def sizes(value: Value) -> list[int | None]:
    """Sizes; None is open."""
    return [size if isinstance(size, int) else None for size in value.shape]


def places(row: Value, tokens: int) -> Value:
    """Sample and token of flat rows: [M] -> [M, 2]."""
    sample, token = op.Div(row, number(tokens)), op.Mod(row, number(tokens))
    last = numbers(-1)
    return op.Concat(op.Unsqueeze(sample, last), op.Unsqueeze(token, last), axis=-1)


def tokens_of(cache: Value) -> int:
    """T of a value [B, T, ..]."""
    tokens = sizes(cache)[1]
    assert tokens is not None, f"{cache.name}: the number of tokens is fixed"
    return tokens


def for_every_head(x: Value, heads: int) -> Value:
    """[B, T, h_kv, d] -> [B, T, h, d]: grouped queries share keys and values."""
    _, tokens, own, width = sizes(x)
    if own == heads:
        return x
    assert own is not None and tokens is not None and width is not None, "heads, tokens and widths are fixed"
    shape = op.Concat(op.Shape(x, start=0, end=1), numbers(tokens, own, heads // own, width), axis=0)
    repeated = op.Expand(op.Unsqueeze(x, numbers(3)), shape)
    return op.Reshape(repeated, numbers(-1, tokens, heads, width))


def top_k_of(code: Value) -> Value:
    """k of a value [.., k], as a constant."""
    top_k = sizes(code)[-1]
    assert top_k is not None, "k is fixed"
    return number(top_k)
