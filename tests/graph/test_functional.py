"""functional: views and writes of a trace become operations that alias nothing, equal to the model bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as nnf

from moeca_fx.graph.functional import functional_module
from tests.helpers.passes import count_ops

aten = torch.ops.aten


class Formula(nn.Module):
    """A function of x [B, 6, 8] as a module."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


def _x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(batch))


def _functional(formula: Callable[[Tensor], Tensor], retrace: bool = False) -> fx.GraphModule:
    """The graph, checked against the formula; `retrace` says whether torch's second trace is expected."""
    model = Formula(formula)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        calls = []
        whole = ExportedProgram.run_decompositions
        patch.setattr(ExportedProgram, "run_decompositions", lambda *a: calls.append(1) or whole(*a))
        program = torch.export.export(model, (_x(),), dynamic_shapes=({0: Dim.AUTO},), strict=False)
        module = functional_module(program)
        assert bool(calls) == retrace
        for batch in (2, 5):
            expected = formula(_x(batch))
            assert torch.equal(module(_x(batch)), expected)
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
            assert "val" in node.meta
    return module


def _mask(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x)
    before = mask + 1
    mask.scatter_(2, x.topk(2).indices, 1.0)
    mask.add_(x)
    return mask.unsqueeze(0) * before


def _numbered_rows(x: Tensor) -> Tensor:
    """Positions as models write them, a column at a time."""
    ids = torch.zeros_like(x)
    ids[..., 1] = ids[..., 1] + torch.arange(6)
    before = ids * 2
    ids[..., 2] = ids[..., 2] - torch.arange(6)
    return before + ids.square() + torch.tensor([1.0, 2.0] * 4)


COVERED: dict[str, tuple[Callable[[Tensor], Tensor], dict[Any, int]]] = {
    "chunk of equal parts": (lambda x: x.chunk(4, -1)[1], {aten.split.Tensor: 1}),
    "chunk with a rest": (lambda x: x.chunk(4, dim=1)[-1], {aten.split.Tensor: 1}),
    "flatten": (lambda x: x.flatten(1), {aten.view.default: 1}),
    "flatten the batch": (lambda x: x.flatten(0, 1) + 1, {aten.view.default: 1}),
    "unflatten": (lambda x: x.unflatten(-1, (2, 4)), {aten.view.default: 1}),
    "reshape of what has a view": (lambda x: x.reshape(-1, 48), {aten.view.default: 1, aten.clone.default: 0}),
    "reshape of what has none": (
        lambda x: x.transpose(1, 2).reshape(-1, 6),
        {aten._unsafe_view.default: 1, aten.clone.default: 1},
    ),
    "expand_as": (lambda x: x[:, :1].expand_as(x) * x, {aten.expand.default: 1}),
    "a cast": (lambda x: x.to(torch.float64), {aten._to_copy.default: 1}),
    "a cast to what it is": (lambda x: x.float() + 1, {aten._to_copy.default: 0, aten.to.dtype: 0}),
    "contiguous": (lambda x: x.transpose(1, 2).contiguous() + 1, {aten.clone.default: 1}),
    "contiguous already": (lambda x: x.contiguous() + 1, {aten.clone.default: 0}),
    "writes to memory of its own": (_mask, {aten.scatter.value: 1, aten.add.Tensor: 2}),
    "writes to rows of memory of its own": (
        _numbered_rows,
        {aten.select_scatter.default: 2, aten.copy_.default: 0, aten.detach_.default: 0},
    ),
    "an activation in place": (
        lambda x: nnf.silu(nnf.linear(x, torch.ones(4, 8)), inplace=True),
        {aten.silu.default: 1},
    ),
}


@pytest.mark.parametrize("name", COVERED)
def test_without_a_second_trace(name: str) -> None:
    formula, expected = COVERED[name]
    module = _functional(formula)
    assert {op: count_ops(module, op) for op in expected} == expected


def _write_through_a_view(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 0].mul_(2)
    return y


def _write_below_a_view(x: Tensor) -> Tensor:
    y = x + 1
    row = y[:, 0]
    y.mul_(2)
    return row


def _write_to_what_a_composition_gave_back(x: Tensor) -> Tensor:
    y = nnf.softmax(x, -1)
    y.mul_(2)
    return y


def _write_to_a_row_that_is_read(x: Tensor) -> Tensor:
    y = x + 1
    row = y[:, 0]
    y[:, 0] = x[:, 1]
    return y + row[:, None]


def _write_to_a_row_of_a_view(x: Tensor) -> Tensor:
    y = x + 1
    y[:, :2][..., 0] = x[:, 2:4, 1]
    return y


def _write_of_fewer_values_to_a_row(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 0] = x[0, 0]
    return y


RETRACED = {
    "write to a row that is read": _write_to_a_row_that_is_read,
    "write to a row of a view": _write_to_a_row_of_a_view,
    "write of fewer values to a row": _write_of_fewer_values_to_a_row,
    "write through a view": _write_through_a_view,
    "write below a view": _write_below_a_view,
    "write to what a composition gave back": _write_to_what_a_composition_gave_back,
    "a view without a rule": lambda x: x.movedim(1, 2) + 1,
    "a view of two open sizes": lambda x: x.repeat_interleave(x.shape[0], 1).reshape(x.shape[0], x.shape[0], 6, 8),
}


@pytest.mark.parametrize("name", RETRACED)
def test_what_no_rule_covers_is_traced_again(name: str) -> None:
    _functional(RETRACED[name], retrace=True)


def test_bodies_of_higher_order_calls() -> None:
    def formula(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x.chunk(2, -1)[0].float() * 2

    module = _functional(formula)
    targets = {
        node.target for part in module.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes
    }
    assert aten.chunk.default not in targets and aten.split.Tensor in targets


def _set_row(values: list[Tensor]) -> None:
    values[-1][:, 1] = values[0][:, 2]


def _fill_rows(values: list[Tensor]) -> None:
    values[-1][:, 1:3].fill_(0.25)


_STEPS: dict[str, Callable[[list[Tensor]], Tensor | None]] = {
    "new": lambda v: v[-1] + v[0],
    "view": lambda v: v[-1].view(-1, 6, 8),
    "twist": lambda v: v[-1].reshape(-1, 8, 6).reshape(-1, 6, 8),
    "same": lambda v: v[-1].float(),
    "back": lambda v: v[len(v) // 2].contiguous(),
    "part": lambda v: v[-1].chunk(2, 1)[1].expand_as(v[0][:, :3]).repeat(1, 2, 1),
    "write last": lambda v: v[-1].mul_(1.5),
    "write middle": lambda v: v[len(v) // 2].add_(v[-1].flip(0)),
    "write part": _fill_rows,
    "write row": _set_row,
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(sorted(_STEPS)), min_size=2, max_size=8))
def test_any_mixture_of_views_and_writes_equals_eager(names: list[str]) -> None:
    def formula(x: Tensor) -> Tensor:
        values = [x.clone(), x * 2]
        for name in names:
            made = _STEPS[name](values)
            if made is not None:
                values.append(made)
        return torch.stack([value.sum((1, 2)) for value in values], 1)

    with torch.no_grad():
        program = torch.export.export(Formula(formula), (_x(),), dynamic_shapes=({0: Dim.AUTO},), strict=False)
        module = functional_module(program)
        for batch in (2, 3):
            torch.testing.assert_close(module(_x(batch)), formula(_x(batch)), rtol=0, atol=0)
