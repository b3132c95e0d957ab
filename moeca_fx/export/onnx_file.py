"""An export step as an ONNX file, weights beside it."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from moeca_fx.errors import ExportError, require
from moeca_fx.export.step import ExportStep

EXTRA = "onnx"
OPSET = 20
"""From opset 23 on torch writes an Attention node, which TensorRT refuses in fp32."""

OLDEST_OPSET = 18
NEWEST_OPSET = 22


def make_onnx(step: ExportStep, most: int, opset: int = OPSET) -> Any:
    """Trace the step and translate it.

    Args:
        most: largest batch.
        opset: version of ONNX's operators.

    Returns:
        A `torch.onnx.ONNXProgram`.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: torch cannot trace or translate the step.
    """
    for package in ("onnx", "onnxscript"):
        require(package, EXTRA)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(
            f"opset: expected {OLDEST_OPSET} to {NEWEST_OPSET}, found {opset}; {OPSET} suits TensorRT too"
        )
    examples = tuple(step.examples(max(2, step.batch)))
    batch = Dim("batch", min=1, max=max(most, 2))
    shapes = tuple({0: batch} if step.is_batched(value) else None for value in examples)
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(step.module, examples, dynamic_shapes=shapes, strict=False)
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=step.input_names,
                output_names=step.output_names,
                optimize=False,  # its pattern rules take longer than everything else; runtimes have their own
                verbose=False,
            )
        except Exception as error:  # both raise many unrelated types; each becomes one clear error
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExportError(f"export to ONNX failed: {first}; please report this model") from error
        _tidy(made)
    return made


def save_onnx(made: Any, path: Path, external: bool) -> None:
    """Write ``path``, and its weights to ``path.data`` if `external`."""
    made.save(path, external_data=external)


def _tidy(made: Any) -> None:
    """Fold what is constant, drop what is computed twice or read by nothing."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    onnxscript.optimizer.fold_constants(made.model, onnx_shape_inference=False)
    _drop_transposes_of_nothing(made.model)
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        tidy(made.model)


def _drop_transposes_of_nothing(model: Any) -> None:
    """torch writes one before and after every indexed write; onnxruntime would copy whole caches for each."""
    from onnx_ir.convenience import replace_all_uses_with

    for node in list(model.graph):
        if node.op_type == "Transpose" and not node.outputs[0].is_graph_output():
            order = list(node.attributes["perm"].as_ints())
            if order == sorted(order):
                replace_all_uses_with(node.outputs[0], node.inputs[0])
                model.graph.remove(node)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of packages that it does not need and of their own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
