"""What is done to translated graphs: the same results from graphs that onnxruntime runs better."""

from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper

from moeca_fx.errors import ExportError
from moeca_fx.export.onnx.in_place import caches_in_place
from moeca_fx.export.onnx.tidy import tidy
from tests.helpers.onnx_models import onnx_model, run_onnx

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
IN, OUT = "cache_in.site.key", "cache_out.site.key"
WRITE = helper.make_node("ScatterND", [IN, "place", "values"], [OUT])
PORTS = [(IN, FLOAT, ["batch", 3]), ("place", INT64, ["n", 1]), ("values", FLOAT, ["n", 3])]


@pytest.mark.parametrize(
    ("others", "in_place"),
    [
        ([], True),
        ([helper.make_node("Neg", [OUT], ["after"])], True),  # of the new value
        ([helper.make_node("Neg", [IN], ["after"])], False),  # of the old one, at any time
        ([helper.make_node("ReduceSum", [IN, "axes"], ["total"]), helper.make_node("Neg", [OUT], ["after"])], False),
        ([helper.make_node("Reshape", [IN, "flat"], ["view"]), helper.make_node("Neg", ["view"], ["after"])], False),
    ],
)
def test_a_cache_is_written_in_place_unless_the_old_one_may_be_read_later(others: list[Any], in_place: bool) -> None:
    outputs = [(OUT, FLOAT, ["batch", 3]), *([("after", FLOAT, None)] if others else [])]
    constants = {"axes": np.array([1]), "flat": np.array([-1])}
    assert caches_in_place(onnx_model([*others, WRITE], PORTS, outputs, **constants)) == ([OUT] if in_place else [])


@pytest.mark.parametrize("read", ["Neg", "Reshape"])
def test_a_reader_that_the_write_needs_has_run_before_it(read: str) -> None:
    nodes = [
        helper.make_node("Reshape", [IN, "shape"], ["view"]),
        helper.make_node("GatherND", ["view" if read == "Reshape" else IN, "place"], ["held"]),
        helper.make_node("Add", ["held", "values"], ["sum"]),
        helper.make_node("ScatterND", [IN, "place", "sum"], [OUT]),
    ]
    model = onnx_model(
        nodes[0 if read == "Reshape" else 1 :], PORTS, [(OUT, FLOAT, ["batch", 3])], shape=np.array([-1, 3])
    )
    assert caches_in_place(model) == [OUT]


def test_a_cache_that_no_row_is_written_to_stays_where_it_is() -> None:
    other = helper.make_node("Where", ["mask", "values", IN], [OUT])
    ports = [PORTS[0], ("mask", TensorProto.BOOL, ["batch", 1]), ("values", FLOAT, ["batch", 3])]
    assert caches_in_place(onnx_model([other], ports, [(OUT, FLOAT, ["batch", 3])])) == []


@pytest.mark.parametrize("operator", ["ReduceMax", "ArgMax"])
def test_a_reduction_of_no_rows_has_the_right_shape(operator: str) -> None:
    if operator == "ArgMax":
        node, dtype = helper.make_node("ArgMax", ["x"], ["y"], axis=-1, keepdims=0), INT64
    else:
        node, dtype = helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=0), FLOAT
    model = onnx_model([node], [("x", FLOAT, ["n", 4, 8])], [("y", dtype, ["n", 4])], axes=np.array([-1]))
    tidy(model)
    x = np.random.default_rng(0).normal(size=(5, 4, 8)).astype(np.float32)
    want = x.argmax(-1) if operator == "ArgMax" else x.max(-1)
    assert np.array_equal(run_onnx(model, x)[0], want)
    assert run_onnx(model, x[:0])[0].shape == (0, 4)


def test_what_is_reduced_may_have_no_shape_between_nodes() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=INT64),
        helper.make_node("ReduceMax", ["cast", "axes"], ["y"], keepdims=0),
    ]
    model = onnx_model(nodes, [("x", FLOAT, ["n", 4, 8])], [("y", INT64, ["n", 4])], axes=np.array([-1]))
    model.graph[0].outputs[0].shape = None
    tidy(model)
    assert run_onnx(model, np.ones((0, 4, 8), np.float32))[0].shape == (0, 4)

    nodes[0] = helper.make_node("Resize", ["x", "", "scales"], ["cast"])
    model = onnx_model(
        nodes, [("x", INT64, ["n", 4, 8])], [("y", INT64, None)], axes=np.array([-1]), scales=np.ones(3, "f")
    )
    model.graph[0].outputs[0].shape = None
    with pytest.raises(ExportError, match=r"ReduceMax\) reduces axes \[-1\] of a value of unknown rank"):
        tidy(model)


def test_rows_are_gathered_into_the_shape_of_an_output() -> None:
    nodes = [
        helper.make_node("Gather", ["x", "index"], ["rows"], axis=0),
        helper.make_node("Reshape", ["rows", "shape"], ["cache"]),
        helper.make_node("Neg", ["rows"], ["negated"]),
    ]
    inputs = [("x", FLOAT, ["n", 3]), ("index", INT64, ["r"])]
    outputs = [("cache", FLOAT, ["batch", 2, 3]), ("negated", FLOAT, ["r", 3])]
    model = onnx_model(nodes, inputs, outputs, shape=np.array([-1, 2, 3]))
    tidy(model)
    cache = model.graph.outputs[0]
    assert cache.name == "cache" and cache.producer().op_type == "Gather"
    x, index = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([3, 0, 2, 2])
    found = run_onnx(model, x, index)
    assert np.array_equal(found[0], x[index].reshape(-1, 2, 3)) and np.array_equal(found[1], -x[index])


def test_a_split_of_given_sizes_has_no_number_of_outputs() -> None:
    node = helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=0, num_outputs=2)
    ports = [("x", FLOAT, ["n", 3]), ("sizes", INT64, [2])]
    model = onnx_ir.from_proto(
        helper.make_model(
            helper.make_graph(
                [node],
                "case",
                [helper.make_tensor_value_info(*port) for port in ports],
                [helper.make_tensor_value_info(name, FLOAT, [None, 3]) for name in "ab"],
            ),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
    )
    tidy(model)
    first, second = run_onnx(model, np.ones((3, 3), np.float32), np.array([0, 3]))
    assert first.shape == (0, 3) and second.shape == (3, 3)


def test_an_experts_weights_are_an_initializer_of_their_own() -> None:
    width = 20_000  # small constants are folded
    weights = torch.arange(3 * width, dtype=torch.float32).view(3, width)
    nodes = [
        helper.make_node("Gather", ["stacked", "number"], ["own"], axis=0),
        helper.make_node("Add", ["x", "own"], ["y"]),
    ]
    ports = [[(name, FLOAT, [width])] for name in "xy"]
    model = onnx_model(nodes, *ports, number=np.array(1), stacked=weights.numpy())
    model.graph.initializers["stacked"].const_value = onnx_ir.tensor(weights, name="stacked")
    tidy(model)
    assert [node.op_type for node in model.graph] == ["Add"] and set(model.graph.initializers) == {"stacked.1"}
    raw = model.graph.initializers["stacked.1"].const_value.raw
    assert raw.data_ptr() == weights[1].data_ptr()  # a view: nothing is copied
    assert np.array_equal(run_onnx(model, np.zeros(width, np.float32))[0], weights[1].numpy())
