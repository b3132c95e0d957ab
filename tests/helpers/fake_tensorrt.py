"""TensorRT's runtime without a GPU: the methods that `EngineSession` calls, over Python functions and host memory.

It has nothing that TensorRT-RTX lacks (`test_engine_session` compares them), knows tensors by their addresses alone,
and refuses what TensorRT refuses: unset addresses, shapes outside the profile, bytes that are no engine.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorrt_rtx as rtx
import torch
from torch import Tensor

from moeca_fx.export.engine import DTYPES
from moeca_fx.export.graph import BATCH, Port

Compute = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Recorded:
    """What an engine computes.

    Attributes:
        inputs, outputs: its tensors; compute: from those to these.
        hosted: names of the tensors that lie in the host's memory.
        most: largest batch of its profile.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    compute: Compute
    hosted: frozenset[str] = frozenset()
    most: int = 5


class FakeTensorRT:
    """Stands for the module: `engines` are those that its bytes name."""

    __version__ = rtx.__version__
    ILogger, TensorIOMode, TensorLocation = rtx.ILogger, rtx.TensorIOMode, rtx.TensorLocation

    def __init__(self, engines: dict[bytes, Recorded]) -> None:
        self.engines = engines
        self.contexts: list[IExecutionContext] = []

    def Runtime(self, logger: Any) -> "Runtime":  # TensorRT's name
        return Runtime(self, logger)


class Runtime:
    def __init__(self, module: FakeTensorRT, logger: Any) -> None:
        self._module, self._logger = module, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
        recorded = self._module.engines.get(serialized_engine)
        if recorded is None:
            self._logger.log(rtx.ILogger.ERROR, "stdVersionRead == kSERIALIZATION_VERSION failed")
            return None
        return ICudaEngine(self._module, recorded, self._logger)


class ICudaEngine:
    def __init__(self, module: FakeTensorRT, recorded: Recorded, logger: Any) -> None:
        self._module, self._recorded, self._logger = module, recorded, logger
        self._ports = {port.name: port for port in reversed((*recorded.inputs, *recorded.outputs))}

    @property
    def num_io_tensors(self) -> int:
        return len(self._ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self._ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        given = name in {port.name for port in self._recorded.inputs}
        return rtx.TensorIOMode.INPUT if given else rtx.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return rtx.TensorLocation.HOST if name in self._recorded.hosted else rtx.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(rtx.DataType, DTYPES[self._ports[name].dtype])

    def get_tensor_shape(self, name: str) -> Any:
        return rtx.Dims([-1 if isinstance(size, str) else size for size in self._ports[name].shape])

    def create_execution_context(self) -> "IExecutionContext":
        context = IExecutionContext(self._recorded, self._logger)
        self._module.contexts.append(context)
        return context


class IExecutionContext:
    def __init__(self, recorded: Recorded, logger: Any) -> None:
        self._recorded, self._logger = recorded, logger
        self._ports = {port.name: port for port in (*recorded.inputs, *recorded.outputs)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert type(shape) is tuple
        if shape[0] > self._recorded.most:
            return self._refuse(f"Static dimension mismatch while setting input shape for {name}")
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._ports:
            return self._refuse(f"Given invalid tensor name: {name}")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._streams.append(stream_handle)
        unset = [name for name in self._ports if not self._addresses.get(name)]
        unset += [port.name for port in self._recorded.inputs if port.batched and port.name not in self._shapes]
        if unset:
            return self._refuse(f"Neither address or allocator is set for {unset}")
        batch = next(shape[0] for shape in self._shapes.values())
        made = self._recorded.compute([self._at(port, batch).clone() for port in self._recorded.inputs])
        for port, value in zip(self._recorded.outputs, made, strict=True):
            self._at(port, batch).copy_(value)
        return True

    def _at(self, port: Port, batch: int) -> Tensor:
        """The tensor at an address."""
        shape = self._shapes.get(port.name) or tuple(batch if size == BATCH else int(size) for size in port.shape)
        count = torch.Size(shape).numel()
        memory = (ctypes.c_char * (count * port.dtype.itemsize)).from_address(self._addresses[port.name])
        return torch.frombuffer(memory, dtype=port.dtype, count=count).view(shape)

    def _refuse(self, why: str) -> bool:
        self._logger.log(rtx.ILogger.ERROR, why)
        return False


STAND_INS = (Runtime, ICudaEngine, IExecutionContext)
