"""An engine of TensorRT or TensorRT-RTX: torch's CUDA tensors are bound by address, on torch's current stream.

Numbers from which lengths follow (`force`, `lengths`) are shape tensors, which TensorRT reads from the host's memory
when a step is enqueued; everything else lies on the GPU. Nothing waits for the GPU: what a step wrote is read on the
same stream. With lengths as an input, what they needed is waited for once a step.
On CUDA's default stream TensorRT waits for the whole device instead, so call a model inside ``torch.cuda.stream``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeca_fx.errors import ExportError
from moeca_fx.export.engine import check_tensor, find_backend, make_log
from moeca_fx.export.graph import Port
from moeca_fx.export.lengths import LENGTHS
from moeca_fx.export.sessions.base import Buffers, check_names

_ALIGNMENT = 256  # bytes, of every address on a GPU


class EngineSession:
    """One loaded engine, on the GPU that was torch's current one.

    Args:
        kind: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        path: of the serialised engine.
        inputs, outputs: that it must have.

    Raises:
        ExportError: there is no GPU, TensorRT cannot load the engine, or it is not that of the manifest.
        MissingExtraError: TensorRT is not installed.
    """

    writes_in_place = False

    def __init__(self, kind: str, path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self._device = _gpu()
        self.device = str(self._device)
        name, trt = find_backend(kind)  # type: ignore[arg-type]  # a backend's own name
        self.path, self.inputs, self.outputs = path, tuple(inputs), tuple(outputs)
        self._log = make_log(trt)
        self._runtime, self._engine, self._context = _open(trt, f"{name} {trt.__version__}", path, self._log)
        self._check(trt)
        places = {port.name: self._engine.get_tensor_location(port.name) for port in (*self.inputs, *self.outputs)}
        self._hosted = {name for name, place in places.items() if place == trt.TensorLocation.HOST}
        if odd := [port.name for port in self.outputs if port.name in self._hosted]:
            raise ExportError(f"{path.name}: expected every output on the GPU, found {odd} in the host's memory")
        self._held: list[Tensor] = []

    def run(self, given: Sequence[Tensor], into: Buffers) -> Sequence[Tensor]:
        """See `Session.run`; a buffer must not share memory with an input.

        Raises:
            ExportError: a tensor is not where the engine reads it, or TensorRT refuses its shape or the step.
        """
        placed = [self._place(port, tensor) for port, tensor in zip(self.inputs, given, strict=True)]
        made = into()
        for port, tensor in zip(self.inputs, placed, strict=True):
            if port.batched and not self._context.set_input_shape(port.name, tuple(tensor.shape)):
                raise ExportError(
                    f"{self.path.name}: expected {port.name} as {list(port.shape)} within the batches that the engine "
                    f"was built for, found {list(tensor.shape)}: {self._log.last}"
                )
            self._bind(port, tensor)
        for port, tensor in zip(self.outputs, made, strict=True):
            self._bind(port, tensor)
        if not self._context.execute_async_v3(_stream(self._device)):
            raise ExportError(f"{self.path.name}: TensorRT could not run the step: {self._log.last}")
        # Memory of the GPU is handed on in the stream's order, the host's is not: it is kept until the next step.
        self._held = [tensor for port, tensor in zip(self.inputs, placed, strict=True) if port.name in self._hosted]
        return made

    def _bind(self, port: Port, tensor: Tensor) -> None:
        if not self._context.set_tensor_address(port.name, tensor.data_ptr()):
            raise ExportError(f"{self.path.name}: TensorRT takes no address for {port.name}: {self._log.last}")

    def _place(self, port: Port, tensor: Tensor) -> Tensor:
        """The tensor where the engine reads it; the step's own numbers are brought there, all others must be there."""
        hosted = port.name in self._hosted
        device = torch.device("cpu") if hosted else self._device
        if not tensor.dim() or port.name == LENGTHS:
            tensor = tensor.to(device)
        if tensor.device != device or not tensor.is_contiguous():
            raise ExportError(
                f"{self.path.name}: expected {port.name} as a contiguous tensor on {device}, found one on "
                f"{tensor.device} with strides {tensor.stride()}; move the model's inputs there"
            )
        return tensor if hosted or tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()

    def _check(self, trt: Any) -> None:
        """Raise `ExportError` unless names, dtypes and sizes are those of the manifest: addresses carry none."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = []
        for mode, ports in ((trt.TensorIOMode.INPUT, self.inputs), (trt.TensorIOMode.OUTPUT, self.outputs)):
            order = {port.name: index for index, port in enumerate(ports)}  # an engine's own is another
            own = [name for name in names if engine.get_tensor_mode(name) == mode]
            found.append(sorted(own, key=lambda name, order=order: order.get(name, len(order))))  # type: ignore[misc]
        check_names(self.path, found, self.inputs, self.outputs)
        for port in (*self.inputs, *self.outputs):
            dtype, shape = engine.get_tensor_dtype(port.name), engine.get_tensor_shape(port.name)
            check_tensor(self.path.name, port, dtype, tuple(shape))


def _gpu() -> torch.device:
    """The current one."""
    if not torch.cuda.is_available():
        raise ExportError(
            "running an engine needs an NVIDIA GPU and a torch that was built for CUDA, found none; take the folder to "
            "such a machine, or export as ONNX"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _stream(device: torch.device) -> int:
    """CUDA's handle of torch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def _open(trt: Any, name: str, path: Path, log: Any) -> tuple[Any, Any, Any]:
    """Runtime, engine and context: each needs the one before to live."""
    try:
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        context = None if engine is None else engine.create_execution_context()
    except (RuntimeError, TypeError) as error:  # where TensorRT has nothing to hand out
        raise ExportError(f"{path}: {name} does not start on this GPU: {log.last} ({error})") from error
    if engine is None:
        raise ExportError(
            f"{path}: {name} cannot load the engine: {log.last}; engines run with the version of TensorRT, and on the "
            "GPUs, that they were built for: export again, here or for this GPU's compute capability"
        )
    if context is None:
        raise ExportError(f"{path}: {name} cannot make room for a step: {log.last}; free memory of the GPU")
    return runtime, engine, context
