"""torch.export of a graph whose batch is open."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch.export import Dim, ExportedProgram

from moeca_fx.errors import ExportError
from moeca_fx.export.graph import ExportGraph


def trace(graph: ExportGraph, most: int) -> ExportedProgram:
    """Trace a graph.

    Args:
        most: largest batch.

    Raises:
        ExportError: torch cannot.
    """
    batch = Dim("batch", min=1, max=max(most, 2))
    shapes = tuple({0: batch} if port.batched else None for port in graph.inputs)
    with torch.no_grad(), quiet():
        try:
            return torch.export.export(graph.module, graph.examples, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # it raises many unrelated types; each becomes one clear error
            raise untraceable(graph, "torch.export", error) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's tools warn of their own deprecations; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def untraceable(graph: ExportGraph, what: str, error: BaseException) -> ExportError:
    """What is said where a tool of torch fails on a graph."""
    while error.__cause__ is not None:  # the outermost only says that it failed
        error = error.__cause__
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ExportError(f"export to {what} failed on the graph {graph.name!r}: {first}; please report this model")
