"""Small ONNX graphs, and their results in onnxruntime."""

from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx import helper


def onnx_model(nodes: list[Any], inputs: list[Any], outputs: list[Any], **constants: np.ndarray) -> Any:
    """An `onnx_ir.Model` with sizes inferred; inputs and outputs are (name, element type, shape)."""
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    values = ([helper.make_tensor_value_info(*port) for port in ports] for ports in (inputs, outputs))
    graph = helper.make_graph(nodes, "case", *values, initializer=initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(made))


def run_onnx(model: Any, *given: np.ndarray) -> list[np.ndarray]:
    """Its outputs."""
    proto = onnx_ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(zip((i.name for i in session.get_inputs()), given, strict=True))))
