"""What the operations of `whole` become in ONNX: the same formulas in fewer nodes than torch's own translation.

Every function takes and gives values of onnxscript. No scatter that adds, so that TensorRT takes them; what lists rows
is in `bounded_lists` and `exact_lists`. Shapes are those of the functions that the operations stand for.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir
import torch

from moeca_fx.export.onnx import decisions
from moeca_fx.export.onnx.bounded_lists import BOUNDED_LISTS
from moeca_fx.export.onnx.exact_lists import EXACT_LISTS
from moeca_fx.export.onnx.given_lengths import GIVEN_LISTS
from moeca_fx.export.onnx.padded_attention import count_padded
from moeca_fx.export.onnx.tables import feature_norm, take_branches, write_branches
from moeca_fx.export.onnx.values import (
    FLOAT,
    Value,
    as_dtype,
    number,
    numbers,
    op,
    places,
    sizes,
    tokens_of,
)
from moeca_fx.export.onnx.whole import WHOLE, Lengths
from moeca_fx.ops import bounded, dispatch, rows, slot_decisions, slots
from moeca_fx.ops.grouped_linear import grouped_linear
from moeca_fx.policies import branch


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


def _padded_linear(x: Value, weight: Value, bias: Value | None) -> Value:
    """See `ops.bounded.grouped_linear`; no size of the table is computed."""
    experts, width, depth = sizes(weight)
    assert experts is not None and width is not None and depth is not None, "weights are of fixed sizes"
    grouped = op.Reshape(x, numbers(experts, -1, depth))
    out = op.MatMul(grouped, op.Transpose(weight, perm=[0, 2, 1]))
    out = out if bias is None else op.Add(out, op.Unsqueeze(bias, numbers(1)))
    out.dtype, out.shape = x.dtype, onnx_ir.Shape([experts, f"({x.shape[0]})//{experts}", width])
    return op.Reshape(out, numbers(-1, width))


def _combine_slots(feature: Value, weight: Value) -> Value:
    dtype = feature.dtype if feature.dtype == weight.dtype else FLOAT
    rows_of_weights = op.Unsqueeze(as_dtype(weight, dtype), numbers(2))
    combined = op.Squeeze(op.MatMul(rows_of_weights, as_dtype(feature, dtype)), numbers(2))
    return combined if dtype == feature.dtype else op.Cast(combined, to=feature.dtype)


def _gather_rows(x: Value, row: Value, batch_axis: int, token_axis: int) -> Value:
    """From all tokens as one list: a view, where `x` is no input of the graph."""
    rest = sizes(x)[2:]
    if None in rest:
        return op.Unsqueeze(op.GatherND(x, places(row, tokens_of(x))), numbers(1))
    flat = op.Reshape(x, numbers(-1, *(size or 0 for size in rest)))
    return op.Gather(flat, op.Unsqueeze(row, numbers(1)), axis=0)


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
    bounded.grouped_linear: _padded_linear,
    bounded.update_activation: decisions.update_activation,
    branch.expert_threshold: decisions.expert_threshold,
    branch.decide: decisions.decide,
    branch.to_slots: decisions.to_slots,
    slot_decisions.part_of_norms: decisions.part_of_norms,
    slot_decisions.refreshed_tokens: decisions.refreshed_tokens,
    slot_decisions.decide_slots: decisions.decide_slots,
    slots.forced_code: decisions.forced_code,
    slots.count_padded: count_padded,
    slots.token_mask: decisions.token_mask,
    dispatch.combine_slots: _combine_slots,
    dispatch.feature_norm: feature_norm,
    rows.gather_rows: _gather_rows,
    rows.gather_samples: _gather_samples,
    rows.gather_tokens: _gather_tokens,
}


_LISTS = {"range": BOUNDED_LISTS, "nonzero": EXACT_LISTS, "input": GIVEN_LISTS}


def translations(lengths: Lengths = "range") -> dict[Any, Callable[..., Any]]:
    """Operation -> its translation, for `torch.onnx.export`."""
    whole = {WHOLE[function]: translation for function, translation in (_OF_FUNCTIONS | _LISTS[lengths]).items()}
    return whole | {torch.ops.aten.sort.stable: _stable_sort, grouped_linear._opoverload: _grouped_linear}
