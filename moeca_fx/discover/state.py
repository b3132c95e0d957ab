"""What a forward pass leaves behind in a model: buffers, parameters and Python numbers that it writes.

    self.calls += 1                    a number, or a buffer: the next call may read it
    self.load = 0.9 * self.load + ...  "blocks.1.mlp.load"

A compiled graph keeps no such state, and a cached step does not run every expert, so a model that has any is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NUMBERS = (int, float, bool)


class State:
    """The state of a model at one moment; of parameters only their versions, which every write raises.

    Args:
        model: read, not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
        self.versions = {name: _version(parameter) for name, parameter in model.named_parameters()}
        self.numbers = {
            (path, name): value
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if type(value) in _NUMBERS
        }

    def changed(self) -> list[str]:
        """Paths of what differs now, in module order."""
        now = State(self.model)
        buffers = [
            name
            for name, (_, value) in now.buffers.items()
            if name not in self.buffers or not _same(value, self.buffers[name][1])
        ]
        parameters = [name for name, version in now.versions.items() if self.versions.get(name, version) != version]
        numbers = [
            f"{path}.{name}".lstrip(".")
            for (path, name), value in now.numbers.items()
            if not _equal(self.numbers.get((path, name), value), value)
        ]
        return [*buffers, *parameters, *numbers]

    def restore(self) -> None:
        """Set buffers and numbers back to what they were."""
        modules = dict(self.model.named_modules())
        for name, (buffer, value) in self.buffers.items():
            path, _, own = name.rpartition(".")
            with torch.no_grad():
                if not _same(buffer, value):
                    buffer.copy_(value)
            modules[path]._buffers[own] = buffer
        for (path, name), number in self.numbers.items():
            object.__setattr__(modules[path], name, number)


@contextmanager
def first_run(model: nn.Module) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Keep arguments, keyword arguments and result of the model's first finished run inside the block."""
    seen: list[tuple[Any, Any, Any]] = []

    def record(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not seen:
            seen.append((args, kwargs, output))

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _equal(left: float, right: float) -> bool:
    return left == right or (left != left and right != right)


def _same(left: Tensor, right: Tensor) -> bool:
    same_kind = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
    if not same_kind or left.is_meta:
        return same_kind
    return torch.equal(left, right) or torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)
