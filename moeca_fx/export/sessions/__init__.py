"""What runs the graphs of an artefact, a file for each kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeca_fx.errors import ConfigError, ExportError
from moeca_fx.export.graph import Port
from moeca_fx.export.sessions.base import Session
from moeca_fx.export.sessions.engine import EngineSession
from moeca_fx.export.sessions.onnx import CPU, OnnxSession
from moeca_fx.export.sessions.package import PackageSession
from moeca_fx.export.sessions.program import ProgramSession

__all__ = ["CPU", "KINDS", "RunOptions", "Session", "open_session"]

KINDS = {
    "onnx": "ONNX, in onnxruntime",
    "pt2": "a program of torch.export",
    "aotinductor": "a package of AOTInductor",
    "tensorrt": "an engine of TensorRT",
    "tensorrt-rtx": "an engine of TensorRT-RTX",
}


@dataclass(frozen=True)
class RunOptions:
    """How an artefact is run.

    Attributes:
        providers: onnxruntime's execution providers, the best first; of ONNX alone.
        strict: refuse to run on another provider than those.
        threads: of onnxruntime on a CPU; None takes torch's, which all other kinds use.
    """

    providers: Sequence[str] = (CPU,)
    strict: bool = True
    threads: int | None = None


def open_session(
    kind: str, path: Path, inputs: Sequence[Port], outputs: Sequence[Port], options: RunOptions
) -> Session:
    """Load one graph of an artefact.

    Raises:
        ExportError: it cannot be run here, or takes and gives other tensors than its manifest says.
        ConfigError: options of another kind.
        MissingExtraError: what runs it is not installed.
    """
    if kind not in KINDS:
        raise ExportError(
            f"{path}: expected one of {', '.join(KINDS)} as the manifest's kind, found {kind!r}; export the model again"
        )
    if kind != "onnx" and (tuple(options.providers) != (CPU,) or options.threads is not None):
        raise ConfigError(f"{path}: providers and threads are onnxruntime's, and this is {KINDS[kind]}; drop them")
    if kind == "onnx":
        return OnnxSession(path, inputs, outputs, options.providers, strict=options.strict, threads=options.threads)
    if kind == "pt2":
        return ProgramSession(path, inputs, outputs)
    if kind == "aotinductor":
        return PackageSession(path, inputs, outputs)
    return EngineSession(kind, path, inputs, outputs)
