"""Graphs as ONNX files, their weights beside them."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moeca_fx.errors import ExportError, require
from moeca_fx.export.graph import ExportGraph
from moeca_fx.export.lengths import GivenList
from moeca_fx.export.onnx.names import label, name_nodes
from moeca_fx.export.onnx.whole import Lengths, keep_whole
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


def make_onnx(
    graph: ExportGraph, most: int, opset: int = OPSET, sites: Sites = _NO_SITES, lengths: Lengths = "range"
) -> Any:
    """Trace a graph and translate it.

    Args:
        most: largest batch.
        opset: version of ONNX's operators.
        sites: whose names the nodes shall have.
        lengths: how lists are made whose length depends on data.

    Returns:
        An `onnx_ir.Model`; with lengths ``"input"`` it has one more input and output (see `given_lengths`).

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
    from moeca_fx.export.onnx.given_lengths import lengths_as_input
    from moeca_fx.export.onnx.tidy import tidy
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
                custom_translation_table=translations(lengths),
                optimize=False,  # its pattern rules take longer than everything else; runtimes have their own
                verbose=False,
            )
        except Exception as error:  # it raises many unrelated types; each becomes one clear error
            raise untraceable(graph, "ONNX", error) from error
        assert made is not None, "torch translates, or raises"
        model = made.model
        tidy(model, exact=lengths == "nonzero")
        if lengths == "input":
            lengths_as_input(model, {site.path: site.tokens for site in sites.ordered})
        name_nodes(model)
    return model


def lists_of(model: Any) -> tuple[GivenList, ...]:
    """The lists whose lengths a model of `make_onnx` takes, in the order of that input."""
    from moeca_fx.export.onnx.given_lengths import META

    return tuple(model.meta[META])


def save_onnx(models: Mapping[str, Any], folder: Path, external: bool) -> None:
    """Write ``<name>.onnx`` for each, and the weights of all, each once, to `WEIGHTS` if `external`."""
    import onnx_ir

    if external:
        _share_weights(list(models.values()), folder)
    for name, model in models.items():
        onnx_ir.save(model, folder / f"{name}.onnx")


def _share_weights(models: Sequence[Any], folder: Path) -> None:
    """Move weights into one file, each once; several graphs may hold one under other names, turned by each of them."""
    import onnx_ir
    from onnx_ir import external_data

    weights: dict[Any, list[Any]] = {}
    for model in models:
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.nbytes > _SMALL:
                weights.setdefault(_content(value.const_value), []).append(value)
    first = [values[0].const_value for values in weights.values()]
    for values, tensor in zip(
        weights.values(), external_data.convert_tensors_to_external(first, folder, WEIGHTS), strict=True
    ):
        for value in values:
            value.const_value = onnx_ir.ExternalTensor(
                tensor.location,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=tensor.base_dir,
            )


def _content(tensor: Any) -> tuple[Any, ...]:
    """Equal for equal tensors alone."""
    import numpy

    bits = numpy.ascontiguousarray(tensor.numpy()).reshape(-1).view(numpy.uint8)
    return tensor.dtype, tuple(tensor.shape), hashlib.blake2b(bits.data).digest()


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
