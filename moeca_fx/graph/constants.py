"""Values that a model's Python reads from tensors which no input reaches, known while it is traced on fake tensors.

    sizes = torch.tensor([h // 2, w // 2])          fake in a trace, yet its values follow from shapes alone
    sizes = sizes.unsqueeze(0).repeat(batch, 1)     likewise
    for i, (rows, columns) in enumerate(sizes):
        part = x[i, : rows * columns]         -->   x[0, :16]: without this, a size that depends on data

torch.export gives every such read an unknown size, which no reshape can take. Here each call whose tensors are all
known, and whose other arguments are plain numbers, is repeated on real twins of its operands: what a factory makes is
known, what reads an input, a weight, a random number or a symbolic size is not. A tensor stays known only while every
write to its memory was repeated on its twin, which the version counters of the two tell. Known numbers are handed to
the trace as they are; where an unknown one is read is remembered, for the error message.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_LARGEST = 1 << 20
"""Elements above which a tensor counts as unknown: numbers that Python reads come from small ones."""

_READS: tuple[Any, ...] = (
    Tensor.item,
    Tensor.tolist,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__bool__,
    Tensor.__index__,
    Tensor.__complex__,
)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class _NotRepeatable(Exception):
    """An operation that draws random numbers."""


class _Deterministic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Refuses operations that draw random numbers, before they do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _NotRepeatable(str(func))
        return func(*args, **(kwargs or {}))


class KnownValues(TorchFunctionMode):
    """Follows what is computed from shapes and literals alone; see the module docstring.

    Attributes:
        scalars: every known number in the order in which it was computed. Two runs on inputs of equal shapes and other
            values must agree in them.
        unknown: where Python read a number that is not known, ``function (file:line)``, without repetitions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scalars: list[float | int | bool] = []
        self.unknown: list[str] = []
        self._twins: Any = WeakIdKeyDictionary()  # tensor -> (twin, version of the tensor, version of the twin)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = list(_leaves((args, kwargs)))
        known = not any(isinstance(leaf, _SYMBOLIC) for leaf in leaves) and all(
            self._twin(leaf) is not None for leaf in leaves if isinstance(leaf, Tensor)
        )
        if func in _READS:
            if known:
                with outside_of_traces():
                    return func(self._twin(args[0]))
            self._remember(sys._getframe(1))
        on_twins = _map_leaves(self._as_real, (args, kwargs)) if known else None  # before the call writes to any
        result = func(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        writes = result is None and any(isinstance(leaf, Tensor) for leaf in leaves)  # x[..] = y
        if on_twins is not None and (made or writes) and all(_is_small(tensor) for tensor in made):
            self._repeat(func, on_twins[0], on_twins[1], made)
        return result

    def _twin(self, tensor: Tensor) -> Tensor | None:
        """The tensor's real counterpart, if all that was written to the one was written to the other."""
        entry = self._twins.get(tensor)
        if entry is None:
            return None
        twin, before, twin_before = entry
        return twin if tensor._version - before == twin._version - twin_before else None

    def _repeat(self, func: Callable[..., Any], args: Any, kwargs: Any, made: list[Tensor]) -> None:
        """Run a call on twins; its results get theirs."""
        try:
            with outside_of_traces(), _Deterministic():
                real = func(*args, **kwargs)
        except (_NotRepeatable, RuntimeError, TypeError, NotImplementedError):
            return  # then its results stay unknown, and a write of it leaves the counters apart
        twins = [leaf for leaf in pytree.tree_leaves(real) if isinstance(leaf, Tensor)]
        if [twin.shape for twin in twins] != [tensor.shape for tensor in made]:
            return
        for tensor, twin in zip(made, twins, strict=True):
            self._twins[tensor] = (twin, tensor._version, twin._version)
            if twin.numel() == 1:
                self._announce(tensor, twin)

    def _announce(self, tensor: Tensor, twin: Tensor) -> None:
        """Reads from C++ (sizes, slices) do not come by here: a fake tensor answers them from its memo."""
        with outside_of_traces():
            value = twin.item()
        if isinstance(tensor, FakeTensor):
            tensor.item_memo = value
            self.scalars.append(value)
        elif tensor.device.type != "meta":
            with torch._C.DisableTorchFunction():
                self.scalars.append(tensor.item())

    def _as_real(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._twin(leaf)
        is_device = isinstance(leaf, torch.device)
        return torch.device("cpu") if (is_device and leaf.type == "meta") or leaf == "meta" else leaf

    def _remember(self, frame: FrameType) -> None:
        place = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"
        if place not in self.unknown:
            self.unknown.append(place)


@contextmanager
def outside_of_traces() -> Iterator[None]:
    """Real computation on real tensors, whatever traces the code around it."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


def _is_small(tensor: Tensor) -> bool:
    sizes = list(tensor.shape)
    return all(isinstance(size, int) for size in sizes) and tensor.numel() <= _LARGEST and not tensor.is_inference()


def _leaves(value: Any) -> Iterator[Any]:
    """Leaves of arguments; slices, which pytrees do not open, are opened."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, slice):
            yield from (leaf.start, leaf.stop, leaf.step)
        else:
            yield leaf


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    def change(leaf: Any) -> Any:
        if isinstance(leaf, slice):
            return slice(function(leaf.start), function(leaf.stop), function(leaf.step))
        return function(leaf)

    return pytree.tree_map(change, value)
