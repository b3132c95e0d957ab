"""Graphs as ONNX files, their weights beside them."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moeca_fx.errors import ExportError, require
from moeca_fx.export.graph import ExportGraph
from moeca_fx.export.onnx.names import label, name_nodes
from moeca_fx.export.onnx.whole import keep_whole
from moeca_fx.export.trace import quiet, trace, untraceable
from moeca_fx.graph.sites import Sites

EXTRA = "onnx"
OPSET = 20
"""From opset 23 on torch writes an Attention node, which TensorRT refuses in fp32."""

OLDEST_OPSET = 18
NEWEST_OPSET = 22
WEIGHTS = "weights.data"
_NO_SITES = Sites(())
_SMALL = 256  # bytes; smaller constants stay in the graph


def make_onnx(graph: ExportGraph, most: int, opset: int = OPSET, sites: Sites = _NO_SITES) -> Any:
    """Trace a graph and translate it.

    Args:
        most: largest batch.
        opset: version of ONNX's operators.
        sites: whose names the nodes shall have.

    Returns:
        An `onnx_ir.Model`.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: torch cannot trace or translate the graph.
    """
    for package in ("onnx", "onnxscript"):
        require(package, EXTRA)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(
            f"opset: expected {OLDEST_OPSET} to {NEWEST_OPSET}, found {opset}; {OPSET} suits TensorRT too"
        )
    from moeca_fx.export.onnx.translations import translations

    program = trace(replace(graph, module=label(keep_whole(graph.module), sites)), most)
    with torch.no_grad(), _quiet():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[port.name for port in graph.inputs],
                output_names=[port.name for port in graph.outputs],
                custom_translation_table=translations(),
                optimize=False,  # its pattern rules take longer than everything else; runtimes have their own
                verbose=False,
            )
        except Exception as error:  # it raises many unrelated types; each becomes one clear error
            raise untraceable(graph, "ONNX", error) from error
        assert made is not None, "torch translates, or raises"
        model = made.model
        _tidy(model)
        name_nodes(model)
    return model


def save_onnx(models: Mapping[str, Any], folder: Path, external: bool) -> None:
    """Write ``<name>.onnx`` for each, and the weights of all, each once, to `WEIGHTS` if `external`."""
    import onnx_ir

    if external:
        _share_weights(list(models.values()), folder)
    for name, model in models.items():
        onnx_ir.save(model, folder / f"{name}.onnx")


def _share_weights(models: Sequence[Any], folder: Path) -> None:
    """Move weights into one file; parameters of several graphs are of one name and one memory."""
    from onnx_ir import external_data

    weights: dict[tuple[str, int], list[Any]] = {}
    for model in models:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _SMALL:
                place = tensor.raw.data_ptr() if isinstance(tensor.raw, torch.Tensor) else id(tensor.raw)
                weights.setdefault((value.name, place), []).append(value)
    first = [values[0].const_value for values in weights.values()]
    for values, tensor in zip(
        weights.values(), external_data.convert_tensors_to_external(first, folder, WEIGHTS), strict=True
    ):
        for value in values:
            value.const_value = tensor


def _tidy(model: Any) -> None:
    """Fold what is constant, drop what is computed twice or read by nothing."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    names = [value.name for value in model.graph.outputs]
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
    _drop_transposes_of_nothing(model)
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        tidy(model)
    _name_outputs(model, names)


def _name_outputs(model: Any, names: Sequence[str]) -> None:
    """Outputs that are computed alike have become one value: each is its own again."""
    import onnx_ir

    for index, name in enumerate(names):
        value = model.graph.outputs[index]
        if value.name != name:
            node = onnx_ir.node("Identity", [value])
            node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, value.dtype, value.shape
            model.graph.append(node)
            model.graph.outputs[index] = node.outputs[0]


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
        with quiet():
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
