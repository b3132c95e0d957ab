"""torch.compile for the graphs of a program: when, how, and what is said about it.

Dynamo's guards would check some hundred parameters at every call. The runtime knows better: a program serves one kind
of call and is dropped when weights move, so a compiled step is chosen by batch size and threads alone.
"""

import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

log = logging.getLogger("moeca_fx.compile")
OFF = "MOECA_FX_COMPILE"
"""Environment variable: 0 runs all graphs eagerly, whatever `transform` was told."""

Step = Callable[..., Any]
_FAILURES = (TorchDynamoException, InductorError)


@functools.cache
def say_once(message: str) -> None:
    """Log a message, each once a process; a warning, unless compilation was switched off."""
    log.log(logging.INFO if os.environ.get(OFF) == "0" else logging.WARNING, "%s", message)


def why_not_compiled(device: torch.device) -> str | None:
    """What keeps graphs on this device from being compiled; None where nothing does."""
    if os.environ.get(OFF) == "0":
        return f"{OFF}=0 is set"
    if device.type == "cpu":
        found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        return None if found else "there is no C++ compiler (g++ or clang++; set CXX)"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "there is no triton"
    return f"moeca_fx compiles for CPU and CUDA, not for {device.type}"


class CompiledStep:
    """A graph that is compiled when it is first called.

    The first batch size gets code of its own; at the second, code for any batch size is made.

    Args:
        module: the graph.
        name: for the progress line, e.g. ``full step``.
    """

    def __init__(self, module: fx.GraphModule, name: str) -> None:
        self.module = module
        self.name = name
        self._ready: dict[tuple[int, int], Step] = {}  # by batch size and threads
        self._open: dict[int, Step] = {}  # for any batch size, by threads

    def __call__(self, batch: int, *inputs: Any) -> Any:
        """Run one step of `batch` samples."""
        step = self._ready.get((batch, torch.get_num_threads()))
        return step(*inputs) if step is not None else self._first(batch, inputs)

    def _first(self, batch: int, inputs: tuple[Any, ...]) -> Any:
        """The first call of a batch size, with the settings that tracing needs."""
        threads = torch.get_num_threads()
        fixed = all(threads != other for _, other in self._ready)
        if not fixed and threads in self._open:
            step = self._open[threads]
            with _tracing():
                result = step(*inputs)
        else:
            step = _compiled(self.module, open_batch=not fixed, device=_device_of(inputs))
            try:
                with _announced(self.name, batch if fixed else None), _tracing():
                    result = step(*inputs)
            except _FAILURES as error:
                first = str(error).strip().splitlines()[0]
                say_once(f"the {self.name} could not be compiled and runs eagerly, more slowly: {first}")
                step = self.module.forward
                result = step(*inputs)
            if not fixed:
                self._open[threads] = step
        self._ready[batch, threads] = step
        return result


def _compiled(module: fx.GraphModule, *, open_batch: bool, device: torch.device) -> Step:
    options: dict[str, Any] = {}
    if not open_batch:  # guards would only tell batch sizes apart
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    if device.type == "cuda":
        options["triton.cudagraphs"] = not open_batch
    return torch.compile(module.forward, fullgraph=True, dynamic=open_batch, options=options)


def _device_of(inputs: tuple[Any, ...]) -> torch.device:
    return next((leaf.device for leaf in inputs if isinstance(leaf, torch.Tensor)), torch.device("cpu"))


@contextmanager
def _tracing() -> Iterator[None]:
    """A step's recomputed rows are as many as the data say: sizes that the compiler must leave open."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@contextmanager
def _announced(name: str, batch: int | None) -> Iterator[None]:
    size = "any batch size" if batch is None else f"batch {batch}"
    log.info("compiling the %s for %s; later processes find it in the compiler's cache", name, size)
    start = time.perf_counter()
    yield
    log.info("compiled the %s for %s in %.1f s", name, size, time.perf_counter() - start)
