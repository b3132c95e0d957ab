"""Constants and tables that are given the axes of what they meet: the same results in longer loops."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from moeca_fx.export.onnx import broadcasts
from moeca_fx.export.onnx.broadcasts import lengthen_loops
from tests.helpers.onnx_models import onnx_model, run_onnx

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        (["n", 1, 4], 3),
        (["n", 1], 2),
        (["n", 7, 1], 3),
        (["n", 4], 0),  # one loop already
        ([1, "n", 4], 0),  # nothing in front of the axis of 1
        (["n", 1, 512], 0),  # long loops; activations are known to runtimes by their numbers
        (["n", 1, "m"], 0),
    ],
)
def test_a_number_gets_the_axes_of_what_it_meets(shape: list[Any], axes: int) -> None:
    model = onnx_model(
        [helper.make_node("Add", ["x", "number"], ["y"])],
        [("x", FLOAT, shape)],
        [("y", FLOAT, shape)],
        number=np.float32(0.5),
    )
    lengthen_loops(model)
    (add,) = (node for node in model.graph if node.op_type == "Add")
    made = add.inputs[1].producer()
    number = add.inputs[1].const_value if made is None else made.attributes["value"].as_tensor()
    assert list(number.shape) == [1] * axes
    x = RNG.normal(size=[5 if isinstance(size, str) else size for size in shape]).astype(np.float32)
    assert np.array_equal(run_onnx(model, x)[0], x + np.float32(0.5))


def test_each_number_of_a_choice_gets_axes() -> None:
    model = onnx_model(
        [helper.make_node("Where", ["mask", "one", "x"], ["y"])],
        [("mask", BOOL, ["n", 1, 4]), ("x", INT64, ["n", 1, 4])],
        [("y", INT64, ["n", 1, 4])],
        one=np.int64(1),
    )
    lengthen_loops(model)
    mask, x = RNG.random((5, 1, 4)) > 0.5, RNG.integers(9, size=(5, 1, 4))
    assert np.array_equal(run_onnx(model, mask, x)[0], np.where(mask, 1, x))
    assert any(node.op_type == "Constant" for node in model.graph)


def test_half_of_a_norm_stays_what_runtimes_know() -> None:
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["mean"]), helper.make_node("Add", ["mean", "eps"], ["y"])]
    constants = {"axes": np.array([-1]), "eps": np.float32(1e-6)}
    model = onnx_model(nodes, [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 1])], **constants)
    lengthen_loops(model)
    assert [node.op_type for node in model.graph] == ["ReduceMean", "Add"]


def _rotated(heads: int, width: int, order: list[int]) -> Any:
    """Rows times their entries of a table [1, 1, T, d], as rotary embeddings have it."""
    nodes = [
        helper.make_node("Gather", ["table", "row"], ["entries"], axis=2),
        helper.make_node("Transpose", ["entries"], ["turned"], perm=order),
        helper.make_node("Mul", ["x", "turned"], ["y"]),
        helper.make_node("Mul", ["y", "turned"], ["z"]),
    ]
    ports = [("x", FLOAT, ["m", heads, 1, width]), ("row", INT64, ["m"])]
    table = RNG.normal(size=(1, 1, 6, width)).astype(np.float32)
    return onnx_model(nodes, ports, [("z", FLOAT, ["m", heads, 1, width])], table=table), table


@pytest.mark.parametrize(
    ("heads", "width", "largest", "gathered"),
    [(4, 8, 2**20, True), (1, 8, 2**20, False), (4, 128, 2**20, False), (4, 8, 100, False)],
)
@pytest.mark.parametrize("rows", [5, 0])
def test_a_table_of_positions_is_repeated_for_every_head(
    heads: int, width: int, largest: int, gathered: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcasts, "_LARGEST", largest)
    model, table = _rotated(heads, width, [2, 0, 1, 3])
    lengthen_loops(model)
    operands = {node.inputs[1].producer().op_type for node in model.graph if node.op_type == "Mul"}
    assert operands == {"Gather" if gathered else "Transpose"}
    repeated = [name for name in model.graph.initializers if name.startswith("table.")]
    assert repeated == (["table.6x4x1x8"] if gathered else [])  # one for both products
    x, row = RNG.normal(size=(rows, heads, 1, width)).astype(np.float32), RNG.integers(6, size=rows)
    entries = table[0, 0, row][:, None, None]
    np.testing.assert_allclose(run_onnx(model, x, row)[0], x * entries * entries, rtol=1e-6)
