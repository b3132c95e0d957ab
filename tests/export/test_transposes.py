"""Transposes that only move axes of 1 become views; the others stay."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from moeca_fx.export.onnx.transposes import drop_transposes
from tests.helpers.onnx_models import onnx_model, run_onnx

FLOAT = TensorProto.FLOAT


def _turned(shape: list[Any], perm: list[int]) -> Any:
    after = [helper.make_node("Transpose", ["x"], ["turned"], perm=perm), helper.make_node("Neg", ["turned"], ["y"])]
    return onnx_model(after, [("x", FLOAT, shape)], [("y", FLOAT, None)])


def _operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


@pytest.mark.parametrize(
    ("shape", "perm", "expected"),
    [
        (["n", 4, 1, 3], [0, 2, 1, 3], ["Reshape", "Neg"]),
        (["n", 1, 4], [1, 0, 2], ["Reshape", "Neg"]),
        (["n", 4, 3], [0, 1, 2], ["Neg"]),
        (["n", 4, 3], [0, 2, 1], ["Transpose", "Neg"]),
        (["n", "m", 1], [0, 2, 1], ["Transpose", "Neg"]),  # two open sizes: no shape to give
        (["n", 1, 4], [2, 0, 1], ["Transpose", "Neg"]),
    ],
)
@pytest.mark.parametrize("rows", [5, 0, 1])
def test_what_becomes_of_a_transpose(shape: list[Any], perm: list[int], expected: list[str], rows: int) -> None:
    model = _turned(shape, perm)
    drop_transposes(model)
    assert _operators(model) == expected
    x = np.random.default_rng(0).normal(size=[rows if isinstance(s, str) else s for s in shape]).astype(np.float32)
    assert np.array_equal(run_onnx(model, x)[0], -x.transpose(perm))


def _parts(shape: list[Any], perm: list[int], *ranges: tuple[int, int]) -> Any:
    """The first axis of a transpose in slices."""
    nodes, constants = [helper.make_node("Transpose", ["x"], ["turned"], perm=perm)], {"axis": np.array([0])}
    for index, pair in enumerate(ranges):
        constants |= {f"{name}{index}": np.array([value]) for name, value in zip(("start", "end"), pair, strict=True)}
        nodes.append(helper.make_node("Slice", ["turned", f"start{index}", f"end{index}", "axis"], [f"y{index}"]))
    outputs = [(f"z{index}", FLOAT, None) for index in range(len(ranges))]
    nodes += [helper.make_node("Neg", [f"y{index}"], [f"z{index}"]) for index in range(len(ranges))]
    return onnx_model(nodes, [("x", FLOAT, shape)], outputs, **constants)


@pytest.mark.parametrize("rows", [5, 0])
def test_queries_keys_and_values_of_rows_are_sliced_first(rows: int) -> None:
    order = [2, 0, 3, 1, 4]
    model = _parts(["n", 1, 3, 4, 8], order, (0, 1), (1, 2), (2, 3))
    drop_transposes(model)
    assert "Transpose" not in _operators(model) and _operators(model).count("Slice") == 3
    x = np.random.default_rng(0).normal(size=(rows, 1, 3, 4, 8)).astype(np.float32)
    for index, found in enumerate(run_onnx(model, x)):
        assert np.array_equal(found, -x.transpose(order)[index : index + 1])


@pytest.mark.parametrize(
    ("shape", "ranges"),
    [
        (["n", 64, 3, 4, 8], [(0, 1), (1, 2)]),  # tokens and heads would still be moved
        (["n", 1, 3, 4, 8], [(0, 2)]),  # more than one entry
        (["n", 1, 3, 4, 8], [(-1, 3)]),  # counted from the back
    ],
)
def test_other_slices_stay_behind_the_transpose(shape: list[Any], ranges: list[tuple[int, int]]) -> None:
    model = _parts(shape, [2, 0, 3, 1, 4], *ranges)
    drop_transposes(model)
    assert _operators(model)[0] == "Transpose"
