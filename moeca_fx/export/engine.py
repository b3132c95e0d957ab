"""TensorRT engines from an ONNX artefact; TensorRT-RTX builds them without a GPU, for the compute capabilities named.

One path serves `tensorrt_rtx` and `tensorrt` (10 and 11). Engines are built here; `sessions.engine` runs them.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moeca_fx.errors import ConfigError, ExportError, MissingExtraError
from moeca_fx.export.graph import BATCH, FORCE, Port
from moeca_fx.export.lengths import LENGTHS, GivenList, read_lists
from moeca_fx.export.manifest import read_port

EXTRA = "tensorrt"
Backend = Literal["auto", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[Backend, ...] = ("auto", "tensorrt", "tensorrt-rtx")
_NO_DRIVER = "driver version"
"""Every process without a GPU's driver hears of that; parsing and building go on."""

_REUSING = 4  # engines are tuned for lists of a fourth of their entries

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

DTYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}
"""TensorRT's names of dtypes."""

Progress = Callable[[str, int, int], bool]
"""Called with a phase's name, its steps so far and in all; False cancels the build."""


def find_backend(backend: Backend = "auto") -> tuple[str, Any]:
    """The name and the module of a TensorRT; ``auto`` prefers the full one.

    Raises:
        ConfigError: no such backend.
        MissingExtraError: it is not installed.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    for name in _MODULES if backend == "auto" else (backend,):
        try:
            return name, importlib.import_module(_MODULES[name])
        except ImportError:
            continue
    wanted = "TensorRT or TensorRT-RTX" if backend == "auto" else backend
    raise MissingExtraError(
        f"this needs {wanted}, which is not installed; run: pip install 'moeca_fx[{EXTRA}]' (TensorRT-RTX, which "
        "builds without a GPU), or install NVIDIA's tensorrt"
    )


@dataclass(frozen=True)
class Rejection:
    """A node of an ONNX file that TensorRT's parser does not take.

    Attributes:
        node, operator: its name and what it does; empty where the file as a whole is refused.
        position: of the node in the file, None where the file as a whole is refused.
        reason: in TensorRT's words.
    """

    node: str
    operator: str
    position: int | None
    reason: str

    def __str__(self) -> str:
        if self.position is None:
            return self.reason
        return f"{self.node or f'node {self.position}'} ({self.operator}): {self.reason}"


@dataclass(frozen=True)
class ParsedNetwork:
    """What TensorRT's parser made of an ONNX file.

    Attributes:
        name, trt, log: the backend, its module, and the logger that remembers its last error.
        builder, network: for `build_engine`.
        parser: owns weights of the network.
        rejections: the nodes that it does not take; with any of them the network is not whole.
    """

    name: str
    trt: Any
    log: Any
    builder: Any
    network: Any
    parser: Any
    rejections: tuple[Rejection, ...]


def parse_onnx(path: Path, backend: Backend = "auto") -> ParsedNetwork:
    """Let TensorRT read an ONNX file into a strongly typed network; nothing is built.

    Operators are checked before any is read, and all that TensorRT does not have are rejected; of those that it has but
    does not take as they stand, the first ends the reading.

    Args:
        path: the ONNX file, weights beside it.
        backend: which TensorRT.

    Raises:
        MissingExtraError: TensorRT is not installed.
    """
    name, trt = find_backend(backend)
    log = make_log(trt, without_driver=True)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    rejections: tuple[Rejection, ...] = ()
    if not parser.parse_from_file(str(path)):
        rejections = tuple(_rejection(parser.get_error(index)) for index in range(parser.num_errors))
        rejections = rejections or (Rejection("", "", None, log.last),)
    return ParsedNetwork(name, trt, log, builder, network, parser, rejections)


def _rejection(error: Any) -> Rejection:
    position = error.node()
    lines = [line for line in error.desc().splitlines() if _NO_DRIVER not in line]
    if len(lines) > 1 and lines[0].startswith("Invalid Node"):  # the node's name once more, then the reason
        del lines[0]
    found = re.fullmatch(r"(?:Assertion failed: .*?[^:]: )?(.*)", lines[0] if lines else "")
    said = found[1] if found is not None else ""
    reason = error.code().name.lower().replace("_", " ")
    if said not in ("", "false"):  # what is printed of an assertion without words
        reason = f"{reason}: {said}"
    return Rejection(error.node_name(), error.node_operator(), None if position < 0 else position, reason)


def build_engine(
    path: Path,
    graph: Mapping[str, Any],
    batch: Sequence[int],
    *,
    backend: Backend = "auto",
    compute_capabilities: Sequence[str] = (),
    workspace: int | None = None,
    user_allocation: bool = False,
    progress: Progress | None = None,
) -> bytes:
    """Parse an ONNX file and build its engine.

    Args:
        path: the ONNX file, weights beside it.
        graph: what the manifest says of it: the inputs and outputs that the network must have.
        batch: least, best and most samples.
        backend: which TensorRT.
        compute_capabilities: such as ``"8.9"``, TensorRT-RTX only; none builds for the GPU that is there.
        workspace: most bytes of scratch memory; None is TensorRT's own limit.
        user_allocation: let the build fail unless all memory of the engine is bounded.
        progress: told of every step; may cancel.

    Raises:
        ExportError: TensorRT refuses a node or the build, or was cancelled.
        ConfigError: a compute capability that this TensorRT does not know.
        MissingExtraError: TensorRT is not installed.
    """
    parsed = parse_onnx(path, backend)
    name, trt, log, builder, network = parsed.name, parsed.trt, parsed.log, parsed.builder, parsed.network
    if parsed.rejections:
        refused = "; ".join(map(str, parsed.rejections))
        exact = any(rejection.operator == "NonZero" for rejection in parsed.rejections)
        todo = "export it with lengths='range' (--lengths range)" if exact else "please report this model"
        raise ExportError(f"{name} refuses the graph: {refused}; {todo}")
    _check_network(network, [[read_port(item) for item in graph[way]] for way in ("inputs", "outputs")])
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, batch, read_lists(graph.get("lists", ()))))
    _set_capabilities(trt, name, config, compute_capabilities)
    config.clear_flag(trt.BuilderFlag.TF32)  # products of 10 bits would let fp32 routers choose other experts
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if user_allocation:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    monitor = _monitor(trt, progress)
    if monitor is not None:
        config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        cancelled = monitor is not None and monitor.cancelled
        raise ExportError("the build was cancelled" if cancelled else f"{name} cannot build the engine: {log.last}")
    return bytes(engine)


def parse_capabilities(text: str) -> tuple[str, ...]:
    """``"89,120"`` or ``"8.9,12.0"`` -> (8.9, 12.0).

    Raises:
        ConfigError: it is neither.
    """
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        digits = part.replace(".", "")
        if not digits.isdigit() or len(digits) < 2:
            raise ConfigError(f"compute capability: expected numbers such as 89 or 8.9, found {part!r}")
        found.append(f"{digits[:-1]}.{digits[-1]}")
    return tuple(found)


def _set_capabilities(trt: Any, name: str, config: Any, wanted: Sequence[str]) -> None:
    if not wanted:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise ConfigError(f"{name} builds for the GPU that is there; leave compute capabilities to tensorrt-rtx")
    known = {key.removeprefix("SM"): value for key, value in trt.ComputeCapability.__members__.items()}
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        if capability.replace(".", "") not in known:
            offered = ", ".join(key for key in known if key.isdigit())
            raise ConfigError(f"compute capability: {name} knows {offered}, found {capability}; name some of these")
        config.set_compute_capability(known[capability.replace(".", "")], index)


def _profile(builder: Any, network: Any, batch: Sequence[int], lists: Sequence[GivenList]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name == FORCE:
            if tensor.is_shape_tensor:  # lengths follow from it
                profile.set_shape_input(FORCE, [0], [0], [1])
        elif tensor.name == LENGTHS:
            if tensor.is_shape_tensor:
                most, best = ([each.most(size) for each in lists] for size in (batch[2], batch[1]))
                profile.set_shape_input(LENGTHS, [0] * len(lists), [size // _REUSING for size in best], most)
        elif len(tensor.shape) and tensor.shape[0] == -1:
            profile.set_shape(tensor.name, *([size, *tensor.shape[1:]] for size in batch))
    return profile


def _check_network(network: Any, ports: Sequence[Sequence[Port]]) -> None:
    """The engine of a machine without a GPU cannot be opened again: its inputs and outputs are compared here."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    found, named = ([[each.name for each in both] for both in pair] for pair in ((inputs, outputs), ports))
    if found != named:
        odd = sorted({*found[0], *found[1]} ^ {*named[0], *named[1]})
        raise ExportError(f"the network and the manifest differ in inputs and outputs: {odd}; please report this model")
    for port, tensor in zip((*ports[0], *ports[1]), (*inputs, *outputs), strict=True):
        check_tensor("the network", port, tensor.dtype, tensor.shape)


def check_tensor(where: str, port: Port, dtype: Any, shape: Sequence[int]) -> None:
    """Raise `ExportError` unless TensorRT's dtype and shape are those of a port; -1 is an open size."""
    found, sizes = list(shape), zip(port.shape, shape, strict=False)
    fits = len(found) == len(port.shape) and all(have == -1 or want in (have, BATCH) for want, have in sizes)
    if dtype.name != DTYPES[port.dtype] or not fits:
        raise ExportError(
            f"{where}: expected {port.name} as {list(port.shape)} {DTYPES[port.dtype]}, as in the manifest, found "
            f"{found} {dtype.name}; export again, and report this model if that does not help"
        )


def make_log(trt: Any, *, without_driver: bool = False) -> Any:
    """A logger whose `last` is the last error, instead of writing to the terminal.

    Args:
        without_driver: forget that there is no driver: TensorRT says so in every process, and builds go on.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # untyped in TensorRT
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and not (without_driver and _NO_DRIVER in message):
                self.last = message

    return Log()


def _monitor(trt: Any, progress: Progress | None) -> Any:
    """TensorRT's progress monitor for `progress`; an interrupt cancels the build too."""
    if progress is None:
        return None
    tell: Progress = progress

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # untyped in TensorRT
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if not self.cancelled:
                try:
                    self.cancelled = not tell(phase_name, step + 1, self.totals.get(phase_name, step + 1))
                except KeyboardInterrupt:
                    self.cancelled = True
            return not self.cancelled

    return Monitor()
