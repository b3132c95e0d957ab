"""A graph as a package of AOTInductor."""

from pathlib import Path

import torch

from moeca_fx.errors import ExportError
from moeca_fx.export.graph import ExportGraph
from moeca_fx.export.trace import quiet, trace, untraceable
from moeca_fx.runtime.compiler import why_not_compiled


def save_package(graph: ExportGraph, most: int, path: Path) -> None:
    """Compile a graph and write its package.

    Args:
        most: largest batch.

    Raises:
        ExportError: there is no compiler, or torch cannot compile the graph.
    """
    device = next((tensor.device for tensor in graph.examples), torch.device("cpu"))
    reason = why_not_compiled(device)
    if reason is not None:
        raise ExportError(f"export to AOTInductor: {reason}; export as ONNX or .pt2 instead")
    program = trace(graph, most)
    try:
        with quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except OSError:
        raise
    except Exception as error:  # Inductor raises many unrelated types; each becomes one clear error
        raise untraceable(graph, "AOTInductor", error) from error
