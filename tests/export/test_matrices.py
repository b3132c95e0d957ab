"""Rows become matrices and signs go into tables; results stay."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from moeca_fx.export.onnx.tidy import tidy
from tests.helpers.onnx_models import onnx_model, run_onnx

FLOAT = TensorProto.FLOAT
RANDOM = np.random.default_rng(0)
CONSTANTS: dict[str, Any] = {
    "w": RANDOM.normal(size=(4, 6)).astype(np.float32),
    "b": RANDOM.normal(size=6).astype(np.float32),
    "table": RANDOM.normal(size=(5, 4)).astype(np.float32),
    "rows": np.array([3, 0]),
    "halves": np.array([2, 2]),
    "one": np.array([1]),
    "thirds": np.array([-1, 1, 3, 2]),
    "two": np.array([2]),
}


def _model(nodes: list[Any], shape: list[Any]) -> Any:
    used = {name for node in nodes for name in node.input}
    constants = {name: value for name, value in CONSTANTS.items() if name in used}
    return onnx_model(nodes, [("x", FLOAT, shape)], [("y", FLOAT, None)], **constants)


def _operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def _check(nodes: list[Any], shape: list[Any], expected: list[str], rows: int) -> None:
    before, after = _model(nodes, shape), _model(nodes, shape)
    tidy(after)
    assert _operators(after) == expected
    x = RANDOM.normal(size=[size if isinstance(size, int) else rows for size in shape]).astype(np.float32)
    np.testing.assert_allclose(run_onnx(after, x)[0], run_onnx(before, x)[0], rtol=1e-5, atol=1e-6)


LINEAR = [
    helper.make_node("MatMul", ["x", "w"], ["product"]),
    helper.make_node("Add", ["product", "b"], ["hidden"]),
]


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["n", 1, 4], ["Reshape", "Gemm", "Reshape"]),
        (["n", 3, 4], ["MatMul", "Add"]),  # the batch itself
    ],
)
def test_a_linear_of_rows(shape: list[Any], expected: list[str], rows: int) -> None:
    _check([*LINEAR, helper.make_node("Neg", ["hidden"], ["y"])], shape, [*expected, "Neg"], rows)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_slice_of_a_matrix_that_is_seen_with_more_axes(rows: int) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "thirds"], ["seen"]),
        helper.make_node("Slice", ["seen", "one", "two", "two"], ["part"]),
        helper.make_node("Neg", ["part"], ["y"]),
    ]
    _check(nodes, ["n", 6], ["Slice", "Reshape", "Neg"], rows)


def test_what_follows_entry_by_entry_needs_no_view() -> None:
    nodes = [
        *LINEAR,
        helper.make_node("Sigmoid", ["hidden"], ["gate"]),
        helper.make_node("Mul", ["hidden", "gate"], ["silu"]),
        helper.make_node("Neg", ["silu"], ["y"]),
    ]
    _check(nodes, ["n", 1, 4], ["Reshape", "Gemm", "Sigmoid", "Mul", "Reshape", "Neg"], 5)


def test_signs_of_half_of_what_a_table_is_multiplied_with() -> None:
    nodes = [
        helper.make_node("Split", ["x", "halves"], ["left", "right"], axis=1),
        helper.make_node("Neg", ["right"], ["minus"]),
        helper.make_node("Concat", ["minus", "left"], ["turned"], axis=-1),
        helper.make_node("Gather", ["table", "rows"], ["factor"], axis=0),
        helper.make_node("Mul", ["turned", "factor"], ["y"]),
    ]
    model = _model(nodes, [2, 4])
    expected = run_onnx(_model(nodes, [2, 4]), x := RANDOM.normal(size=(2, 4)).astype(np.float32))[0]
    tidy(model)
    assert "Neg" not in _operators(model)
    assert np.array_equal(run_onnx(model, x)[0], expected)
