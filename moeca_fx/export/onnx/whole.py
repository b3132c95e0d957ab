"""Operations that stay one node while torch traces a graph for ONNX; `translations` says what each becomes.

    row, valid = bounded.select_rows(mask)      -->     row, valid = moeca_onnx.select_rows(mask)

torch would trace each into some twenty nodes, twice, and every length that depends on data makes that slow: a graph of
DSMoE-S took two minutes. They are for tracing alone and run as the functions they stand for.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from moeca_fx.ops import bounded, dispatch, rows, slot_decisions, slots
from moeca_fx.passes.insert_cache import share_copy
from moeca_fx.policies import branch

Lengths = Literal["range", "nonzero", "input"]
"""Lists whose length depends on data: at least two, by `Range`, as TensorRT asks; exact, by `NonZero`; or given."""

NAMESPACE = "moeca_onnx"
WHOLE: dict[Callable[..., Any], Any] = {}
"""Function -> the operation that stands for it."""


def _whole(function: Callable[..., Any], schema: str) -> Callable[[Callable[..., Any]], None]:
    """Register the operation of a function; the decorated function gives the shapes of its results."""
    made = torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", mutates_args=(), schema=schema)(function)

    def add(shapes: Callable[..., Any]) -> None:
        made.register_fake(shapes)
        WHOLE[function] = made._opoverload

    return add


def _length(most: Any) -> Any:
    """A length that depends on data, from 2 to `most`."""
    length = torch.library.get_ctx().new_dynamic_size(min=2)
    torch._check(length <= most)  # type: ignore[no-untyped-call]  # untyped in torch
    return length


@_whole(bounded.select_rows, "(Tensor mask) -> (Tensor, Tensor)")
def _(mask: Tensor) -> Any:
    length = _length(mask.numel())
    return mask.new_empty(length, dtype=torch.int64), mask.new_empty(length)


@_whole(bounded.valid_code, "(Tensor code, Tensor valid) -> Tensor")
def _(code: Tensor, valid: Tensor) -> Any:
    return torch.empty_like(code)


@_whole(bounded.write_rows, "(Tensor cache, Tensor row, Tensor values, Tensor valid) -> Tensor")
def _(cache: Tensor, row: Tensor, values: Tensor, valid: Tensor) -> Any:
    return cache.new_empty(cache.shape)


@_whole(bounded.take_branches, "(Tensor values, Tensor code, Tensor place) -> Tensor")
def _(values: Tensor, code: Tensor, place: Tensor) -> Any:
    return values.new_empty(code.numel() // code.shape[-1], code.shape[-1], *values.shape[1:])


@_whole(bounded.write_branches, "(Tensor cache, Tensor fresh, Tensor code, Tensor? row) -> Tensor")
def _(cache: Tensor, *_: Any) -> Any:
    return cache.new_empty(cache.shape)


@_whole(bounded.write_computed, "(Tensor cache, Tensor values, Tensor place, Tensor code, Tensor? row) -> Tensor")
def _(cache: Tensor, *_: Any) -> Any:
    return cache.new_empty(cache.shape)


@_whole(
    bounded.attention_rows,
    "(Tensor query, Tensor key, Tensor value, Tensor row, Tensor mask, float? scale) -> Tensor",
)
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return query.new_empty(*query.shape[:2], value.shape[-1])


@_whole(bounded.plan_padded, "(Tensor code, Tensor slot_expert, int num_experts) -> (Tensor, Tensor, Tensor)")
def _(code: Tensor, slot_expert: Tensor, num_experts: int) -> Any:
    entries = num_experts * _length(code.numel())
    return tuple(code.new_empty(size, dtype=torch.int64) for size in (entries, entries, code.numel()))


@_whole(bounded.plan_dense, "(Tensor code, Tensor slot_expert, int num_experts) -> (Tensor, Tensor, Tensor)")
def _(code: Tensor, slot_expert: Tensor, num_experts: int) -> Any:
    entries = num_experts * (code.numel() // code.shape[-1])
    return tuple(code.new_empty(size, dtype=torch.int64) for size in (entries, entries, code.numel()))


@_whole(bounded.plan_grouped, "(Tensor code, Tensor slot_expert, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)")
def _(code: Tensor, slot_expert: Tensor, num_experts: int) -> Any:
    length = _length(code.numel())  # of one row too, but sizes from 2 on trace without questions
    sizes = (length, length, code.numel(), num_experts)
    return tuple(code.new_empty(size, dtype=torch.int64) for size in sizes)


@_whole(bounded.grouped_linear, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    return x.new_empty(x.shape[0], weight.shape[1])


@_whole(bounded.count_valid, "(Tensor valid) -> Tensor")
def _(valid: Tensor) -> Any:
    return valid.new_empty((), dtype=torch.int64)


@_whole(slots.count_padded, "(Tensor mask) -> Tensor")
def _(mask: Tensor) -> Any:
    return mask.new_empty((), dtype=torch.int64)


@_whole(bounded.update_activation, "(Tensor activation, Tensor expert, float beta) -> Tensor")
def _(activation: Tensor, *_: Any) -> Any:
    return activation.new_empty(activation.shape)


@_whole(branch.expert_threshold, "(Tensor activation, float tau0, float alpha, str entropy_norm) -> Tensor")
def _(activation: Tensor, *_: Any) -> Any:
    return activation.new_empty(activation.shape[:2])


@_whole(branch.to_slots, "(Tensor value, Tensor slot) -> Tensor")
def _(value: Tensor, slot: Tensor) -> Any:
    return torch.empty_like(value)


@_whole(
    branch.decide,
    "(Tensor expert, Tensor weight, Tensor cached_expert, Tensor cached_weight, Tensor cached_norm, Tensor threshold, "
    "float lambda1, float lambda2, str kind, ScalarType code_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _(expert: Tensor, weight: Tensor, *rest: Any) -> Any:
    wide = torch.promote_types(weight.dtype, torch.float32)
    dtypes = (torch.int64, expert.dtype, wide, rest[-1])
    return tuple(expert.new_empty(expert.shape, dtype=dtype) for dtype in dtypes)


_DECISION = (
    "(Tensor expert, Tensor weight, Tensor cached_expert, Tensor cached_weight, Tensor part, Tensor threshold, "
    "float lambda1, str kind)"
)


@_whole(slot_decisions.part_of_norms, "(Tensor norm, float lambda2) -> Tensor")
def _(norm: Tensor, lambda2: float) -> Any:
    return torch.empty_like(norm)


@_whole(slot_decisions.refreshed_tokens, f"{_DECISION} -> (Tensor, Tensor)")
def _(expert: Tensor, weight: Tensor, *_: Any) -> Any:
    return expert.new_empty(expert.shape[:2], dtype=torch.bool), torch.empty_like(weight)


@_whole(slot_decisions.decide_slots, f"{_DECISION} -> (Tensor, Tensor, Tensor, Tensor)")
def _(expert: Tensor, weight: Tensor, *_: Any) -> Any:
    wide = torch.promote_types(weight.dtype, torch.float32)
    dtypes = (weight.dtype, expert.dtype, wide, torch.int64)
    return tuple(expert.new_empty(expert.shape, dtype=dtype) for dtype in dtypes)


@_whole(slots.forced_code, "(Tensor code, Tensor force) -> Tensor")
def _(code: Tensor, force: Tensor) -> Any:
    return torch.empty_like(code)


@_whole(slots.token_mask, "(Tensor code) -> Tensor")
def _(code: Tensor) -> Any:
    return code.new_empty(code.shape[:-1], dtype=torch.bool)


@_whole(dispatch.combine_slots, "(Tensor feature, Tensor weight) -> Tensor")
def _(feature: Tensor, weight: Tensor) -> Any:
    return feature.new_empty(*feature.shape[:2], feature.shape[-1])


@_whole(dispatch.feature_norm, "(Tensor feature) -> Tensor")
def _(feature: Tensor) -> Any:
    return feature.new_empty(feature.shape[:-1], dtype=torch.promote_types(feature.dtype, torch.float32))


@_whole(rows.gather_rows, "(Tensor x, Tensor row, int batch_axis, int token_axis) -> Tensor")
def _(x: Tensor, row: Tensor, batch_axis: int, token_axis: int) -> Any:
    return x.new_empty(row.shape[0], 1, *x.shape[2:])


@_whole(rows.gather_samples, "(Tensor x, Tensor row, int tokens, int batch_axis) -> Tensor")
def _(x: Tensor, row: Tensor, tokens: int, batch_axis: int) -> Any:
    return x.new_empty(*x.shape[:batch_axis], row.shape[0], *x.shape[batch_axis + 1 :])


@_whole(rows.gather_tokens, "(Tensor x, Tensor row, int tokens, int batch_axis, int token_axis) -> Tensor")
def _(x: Tensor, row: Tensor, tokens: int, batch_axis: int, token_axis: int) -> Any:
    taken = x.new_empty(*x.shape[:token_axis], row.shape[0], *x.shape[token_axis + 1 :])
    return torch.empty_like(taken.transpose(batch_axis, token_axis), memory_format=torch.contiguous_format)


def keep_whole(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph and of the programs that it calls with these operations in place of their functions."""
    copied = share_copy(module)
    for name, part in copied.named_children():
        if isinstance(part, fx.GraphModule):
            setattr(copied, name, keep_whole(part))
    for node in copied.graph.nodes:
        made = WHOLE.get(node.target) if node.op == "call_function" else None
        if made is not None and _has_translation(node):
            node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}
            node.target = made
    copied.recompile()
    return copied


def _has_translation(node: fx.Node) -> bool:
    """Rows are gathered whole from tensors [B, T, ..] alone."""
    return node.target is not rows.gather_rows or tuple(node.args[2:]) == (0, 1)
