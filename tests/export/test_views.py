"""Views of views become one view, or none; results stay."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from moeca_fx.export.onnx.tidy import tidy
from tests.helpers.onnx_models import onnx_model, run_onnx

FLOAT = TensorProto.FLOAT
SHAPES = {"heads": np.array([-1, 2, 3]), "flat": np.array([-1, 6]), "one": np.array([1])}


def _chain(shape: list[Any], *steps: tuple[str, str]) -> Any:
    """Views after each other, and a node that reads the last."""
    nodes = [
        helper.make_node(operator, ["x" if not place else f"v{place - 1}", constant], [f"v{place}"])
        for place, (operator, constant) in enumerate(steps)
    ]
    nodes.append(helper.make_node("Neg", [f"v{len(steps) - 1}"], ["y"]))
    return onnx_model(nodes, [("x", FLOAT, shape)], [("y", FLOAT, None)], **SHAPES)


@pytest.mark.parametrize(
    ("shape", "steps", "expected", "result"),
    [
        (["n", 6], [("Unsqueeze", "one"), ("Squeeze", "one")], ["Neg"], (-1, 6)),
        (["n", 6], [("Reshape", "heads"), ("Unsqueeze", "one")], ["Reshape", "Neg"], (-1, 1, 2, 3)),
        (["n", 2, 1, 3], [("Reshape", "flat"), ("Unsqueeze", "one"), ("Squeeze", "one")], ["Reshape", "Neg"], (-1, 6)),
        (["n", "m"], [("Unsqueeze", "one"), ("Squeeze", "one")], ["Neg"], (-1, 7)),
        (["n", "m"], [("Unsqueeze", "one"), ("Unsqueeze", "one")], ["Unsqueeze", "Unsqueeze", "Neg"], (-1, 1, 1, 7)),
        (["n", 6], [("Unsqueeze", "one")], ["Unsqueeze", "Neg"], (-1, 1, 6)),
    ],
)
@pytest.mark.parametrize("rows", [5, 1, 0])
def test_what_becomes_of_views(
    shape: list[Any], steps: list[tuple[str, str]], expected: list[str], result: tuple[int, ...], rows: int
) -> None:
    model = _chain(shape, *steps)
    tidy(model)
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == expected
    x = np.random.default_rng(0).normal(size=[{"n": rows, "m": 7}.get(s, s) for s in shape]).astype(np.float32)
    assert np.array_equal(run_onnx(model, x)[0], -x.reshape((rows, *result[1:])))


@pytest.mark.parametrize(("read", "expected"), [(2, ["Unsqueeze", "Split"]), (1, ["Split", "Unsqueeze"])])
def test_parts_of_a_matrix_that_are_given_an_axis(read: int, expected: list[str]) -> None:
    nodes = [
        helper.make_node("Split", ["x"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Unsqueeze", ["left", "one"], ["first"]),
        helper.make_node("Unsqueeze", ["right", "one"], ["second"]),
        helper.make_node("Neg", ["first"], ["y"]),
        helper.make_node("Neg", ["second" if read == 2 else "right"], ["z"]),
    ]
    model = onnx_model(nodes, [("x", FLOAT, ["n", 6])], [("y", FLOAT, None), ("z", FLOAT, None)], **SHAPES)
    tidy(model)
    assert [node.op_type for node in model.graph if node.op_type not in ("Constant", "Neg")] == expected
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    first, second = run_onnx(model, x)
    assert np.array_equal(first, -x[:, None, :3]) and np.array_equal(second.reshape(4, 3), -x[:, 3:])


def test_a_view_that_others_read_stays() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "heads"], ["heads_of"]),
        helper.make_node("Neg", ["heads_of"], ["y"]),
        helper.make_node("Reshape", ["heads_of", "flat"], ["back"]),
        helper.make_node("Abs", ["back"], ["z"]),
    ]
    model = onnx_model(nodes, [("x", FLOAT, ["n", 6])], [("y", FLOAT, None), ("z", FLOAT, None)], **SHAPES)
    tidy(model)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    first, second = run_onnx(model, x)
    assert np.array_equal(first, -x.reshape(4, 2, 3)) and np.array_equal(second, abs(x))
