"""torch.compile for the graphs of a program: when, how, and what is said about it.

Dynamo's guards would check some hundred parameters at every call. The runtime knows better: a program serves one kind
of call and is dropped when weights move, so code for the first batch size is chosen by batch size and threads alone.
Code for any batch size keeps its guards.
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
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from moeca_fx.passes.insert_cache import share_copy
from moeca_fx.runtime.direct import DirectCall

log = logging.getLogger("moeca_fx.compile")
OFF = "MOECA_FX_COMPILE"
"""Environment variable: 0 runs all graphs eagerly, whatever `transform` was told."""

Step = Callable[..., Any]
_CALLS_OPERATORS_FROM_CPP = torch.__version__ >= "2.13"
"""Whether Inductor's C++ wrapper reaches operators of other libraries without going through Python."""
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
        device: of the weights.
    """

    def __init__(self, module: fx.GraphModule, name: str, device: torch.device) -> None:
        self.module = module
        self.name = name
        self.device = device
        self._ready: dict[tuple[int, int], Step] = {}  # by batch size and threads
        self._open: dict[int, Step] = {}  # for any batch size, by threads

    def __call__(self, batch: int, *inputs: Any) -> Any:
        """Run one step of `batch` samples."""
        # Code is made for strides too, and only batch size and threads choose it.
        packed = tuple(leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in inputs)
        step = self._ready.get((batch, torch.get_num_threads()))
        return step(*packed) if step is not None else self._first(batch, packed)

    def _first(self, batch: int, inputs: tuple[Any, ...]) -> Any:
        """The first call of a batch size."""
        threads = torch.get_num_threads()
        fixed = all(threads != other for _, other in self._ready)
        if not fixed and threads in self._open:
            self._ready[batch, threads] = self._open[threads]
            return self._open[threads](*inputs)
        step = self._compiled(open_batch=not fixed)
        with _announced(self.name, batch if fixed else None):
            result = step(*inputs)
        if not fixed:
            self._open[threads] = step
        self._ready[batch, threads] = step
        return result

    def _compiled(self, *, open_batch: bool) -> Step:
        """Code of its own; what cannot be compiled runs eagerly from then on."""
        # Dynamo keeps code by code object, and code without guards would serve every later call: each has its own.
        module = share_copy(self.module)
        options: dict[str, Any] = {}
        if self.device.type == "cpu" and _CALLS_OPERATORS_FROM_CPP:
            options["cpp_wrapper"] = True  # some three hundred calls a step cost less from C++ than from Python
            options["cpp_wrapper_build_separate"] = True  # a fifth of the time less; steps of `digits` run as fast
        direct = DirectCall(module, options)
        if open_batch:
            compiled: Step = torch.compile(module.forward, fullgraph=True, dynamic=True, options=options)
        else:
            unguarded: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
            compiled = torch.compile(
                module.forward, fullgraph=True, dynamic=False, backend=direct.backend, options=unguarded
            )
        made = False
        failed = False

        def run(*inputs: Any) -> Any:
            nonlocal made, failed
            if failed:
                return module.forward(*inputs)
            if direct.ready:
                return direct(*inputs)
            if made and not open_batch:  # without guards nothing is compiled again
                return compiled(*inputs)
            try:
                with _tracing():
                    result = compiled(*inputs)
            except _FAILURES as error:
                first = str(error).strip().splitlines()[0]
                say_once(f"the {self.name} could not be compiled and runs eagerly, more slowly: {first}")
                failed = True
                return module.forward(*inputs)
            made = True
            direct.learn(inputs, result)
            return result

        return run


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
