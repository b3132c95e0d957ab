"""A tape: what one call of a module computed, operation by operation, with every write turned into a new value.

    out = zeros_like(x)                          v3 = zeros_like(v0)
    for e, expert in enumerate(experts):         v7 = experts.0(v5)
        rows = where(ids == e)                   v9 = index_add(v3, 0, v4, v8)
        out.index_add_(0, rows, ..)       -->    ...
    return out + shared(x)                       v20 = shared(v0);  v21 = add(v19, v20);  output: v21

The call runs for real, so Python that looks at data (`.item()`, `.numpy()`, loops over `nonzero`) is no obstacle. What
it leaves on the tape is true for this input alone; `recipe` keeps the parts around the experts, where nothing depends
on data, and checks that. Calls of submodules that hold no expert are one entry each.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_fx.autocast import OFF, Autocast
from moeca_fx.reasons import Reason

aten = torch.ops.aten
_SAME = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)
_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class NotReplayable(Exception):
    """The call did what a tape cannot hold; says what, and which documented reason that is."""

    def __init__(self, reason: str, code: Reason) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Ref:
    """A value of the tape, by number."""

    number: int


@dataclass(frozen=True)
class Source:
    """Where a value that no entry computes comes from.

    Attributes:
        kind: ``input`` (a tensor of the call, by position among its flat arguments), ``state`` (a parameter or buffer
            of the owner, by path) or ``constant`` (a tensor from elsewhere).
    """

    kind: str
    key: int | str | Tensor


@dataclass(frozen=True)
class Entry:
    """One operation, or one call of a submodule (`target` is its path).

    Attributes:
        args, kwargs: with a `Ref` for every tensor.
        outputs: value number of each flat result; None where that is no tensor.
        autocast: what it is called under; operations are recorded with autocast's casts, so that they need none.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int | None, ...]
    autocast: Autocast = OFF

    @property
    def is_module(self) -> bool:
        """Whether it calls a submodule."""
        return isinstance(self.target, str)

    def reads(self) -> list[int]:
        """Numbers of the values it reads."""
        return [leaf.number for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Ref)]


@dataclass
class Tape:
    """What was recorded.

    Attributes:
        sources: values that were there before, by number.
        entries: in order of execution.
        outputs: flat results of the call, a `Ref` for every tensor.
        out_spec: their structure.
        values: tensors by value number, of values that nothing overwrote later.
        sizes: leading size of each flat tensor argument, by position.
    """

    sources: dict[int, Source] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    out_spec: pytree.TreeSpec | None = None
    values: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)


def depends_on(tape: Tape, modules: frozenset[str], states: frozenset[str]) -> frozenset[int]:
    """Numbers of the values that calls of some submodules, or some parameters, have a part in.

    Args:
        tape: what was recorded.
        modules: paths of submodules.
        states: paths of parameters.
    """
    found = {n for n, source in tape.sources.items() if source.kind == "state" and source.key in states}
    for entry in tape.entries:
        if entry.target in modules or not found.isdisjoint(entry.reads()):
            found |= {number for number in entry.outputs if number is not None}
    return frozenset(found)


def from_data(tape: Tape) -> frozenset[int]:
    """Numbers of the values that may change with the call's arguments: all but what follows from parameters alone."""
    found = {number for number, source in tape.sources.items() if source.kind != "state"}
    for entry in tape.entries:
        if entry.is_module or not found.isdisjoint(entry.reads()):
            found |= {number for number in entry.outputs if number is not None}
    return frozenset(found)


def record(owner: nn.Module, opened: frozenset[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tape:
    """Run `owner` once and write down what it computes.

    Args:
        owner: a module in eval mode.
        opened: paths of submodules whose own operations are recorded; every other submodule is one entry.
        args, kwargs: of one call.

    Raises:
        NotReplayable: it writes into its arguments or weights, or hands tensors on in ways that cannot be followed.
    """
    recorder = _Recorder(owner, args, kwargs)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), recorder.listening(opened), recorder:
        result = owner.forward(*args, **kwargs)
    return recorder.finish(result)


@dataclass
class _Memory:
    """What one storage holds: how often it was written, and the value of the first tensor seen over it."""

    written: int
    base: int
    geometry: tuple[Any, ...]
    keep: Tensor


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    def __init__(self, owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.tape = Tape()
        self.count = 0
        self.inside = 0  # depth of submodules that are one entry
        self.known: dict[int, tuple[int, int]] = {}  # id of a tensor -> (value, times its memory was written by then)
        self.alive: list[Tensor] = []  # so that ids stay unique
        self.memories: dict[int, _Memory] = {}
        self.protected: set[int] = set()  # storages that the call must not write to
        self.owner = owner
        states = [*owner.named_parameters(remove_duplicate=False), *owner.named_buffers(remove_duplicate=False)]
        for path, tensor in states:
            if id(tensor) not in self.known:
                self._begin(tensor, Source("state", path))
        for position, leaf in enumerate(pytree.tree_leaves((args, dict(kwargs)))):
            if isinstance(leaf, Tensor) and id(leaf) not in self.known:
                self._begin(leaf, Source("input", position))
                if leaf.dim():
                    self.tape.sizes[position] = leaf.shape[0]

    # -- values -------------------------------------------------------------------------------------------------

    def _begin(self, tensor: Tensor, source: Source) -> None:
        number = self._new(tensor)
        self.tape.sources[number] = source
        if source.kind != "constant":
            self.protected.add(_storage(tensor))

    def _new(self, tensor: Tensor) -> int:
        number, self.count = self.count, self.count + 1
        self._name(tensor, number)
        return number

    def _name(self, tensor: Tensor, number: int) -> None:
        """From now on `tensor` is the value `number`."""
        memory = self.memories.get(_storage(tensor))
        if memory is None:
            memory = self.memories[_storage(tensor)] = _Memory(0, number, _geometry(tensor), tensor)
        self.known[id(tensor)] = (number, memory.written)
        self.alive.append(tensor)

    def _value(self, tensor: Tensor) -> int:
        """The value that `tensor` holds now."""
        if id(tensor) not in self.known:
            memory = self.memories.get(_storage(tensor))
            if memory is None or not tensor.numel():
                self._begin(tensor, Source("constant", tensor))
            else:  # another view of known memory, made where the tape does not look
                self.alive.append(tensor)
                self.known[id(tensor)] = (self._from_base(tensor, memory), memory.written)
        number, written = self.known[id(tensor)]
        memory = self.memories[_storage(tensor)]
        if written != memory.written:
            number = self._from_base(tensor, memory)
            self.known[id(tensor)] = (number, memory.written)
        return number

    def _from_base(self, tensor: Tensor, memory: _Memory) -> int:
        if _geometry(tensor) == memory.geometry:
            return memory.base
        return self._emit(aten.as_strided.default, (Ref(memory.base), *_place(tensor)), {})

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        number, self.count = self.count, self.count + 1
        self.tape.entries.append(Entry(target, args, kwargs, (number,)))
        return number

    def _refs(self, tree: Any) -> Any:
        def ref(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return Ref(self._value(leaf))
            if not isinstance(leaf, _PLAIN):
                raise NotReplayable(f"an operation takes a {type(leaf).__name__}", Reason.OPERANDS)
            return leaf

        return pytree.tree_map(ref, tree)

    # -- operations ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        if func in _SAME:
            result = func(*args, **kwargs)
            self._name(result, self._value(args[0]))
            return result
        read_args, read_kwargs = self._refs(args), self._refs(kwargs)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._write(func, args, kwargs, read_args, read_kwargs)
        else:
            flat = [leaf if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(result)]
            numbers = tuple(None if leaf is None else self._new(leaf) for leaf in flat)
            self.tape.entries.append(Entry(func, read_args, read_kwargs, numbers))
        return result

    def _write(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], read_args: Any, read_kwargs: Any
    ) -> None:
        """An operation that writes into its first argument: the same without writing, then the memory's new value."""
        target = args[0] if args else None
        base = func._schema.name.removeprefix("aten::")
        plain = getattr(getattr(aten, base.removesuffix("_"), None), func._overloadname, None)
        if base == "copy_":
            plain = aten.copy.default
        if not isinstance(target, Tensor) or not base.endswith("_") or plain is None or plain._schema.is_mutable:
            raise NotReplayable(f"{func} writes in a way that cannot be followed", Reason.WRITES)
        if _storage(target) in self.protected:
            raise NotReplayable(f"{func} writes into an argument or a weight", Reason.WRITES)
        number = self._emit(plain, read_args, read_kwargs)
        memory = self.memories[_storage(target)]
        if _geometry(target) == memory.geometry:
            memory.base = number
        else:
            memory.base = self._emit(
                aten.as_strided_scatter.default, (Ref(memory.base), Ref(number), *_place(target)), {}
            )
        memory.written += 1
        self.known[id(target)] = (number, memory.written)

    # -- submodules ---------------------------------------------------------------------------------------------

    @contextmanager
    def listening(self, opened: frozenset[str]) -> Iterator[None]:
        """Watch the calls of every submodule that is not opened."""
        handles = []
        for path, module in self.owner.named_modules():
            if path and path not in opened:
                handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave(path), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.inside:
                self.pending = (self._refs(args), self._refs(kwargs), _versions((args, kwargs)), Autocast.now())
            self.inside += 1

        return enter

    def _leave(self, path: str) -> Any:
        def leave(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= 1
            if self.inside:
                return
            read_args, read_kwargs, versions, autocast = self.pending
            if versions != _versions((args, kwargs)):
                raise NotReplayable(f"the submodule {path} writes into its arguments", Reason.WRITES)
            leaves = pytree.tree_leaves(output)
            if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
                raise NotReplayable(f"the submodule {path} returns a {type(output).__name__}", Reason.OPERANDS)
            numbers: list[int | None] = []
            for leaf in leaves:
                own = isinstance(leaf, Tensor) and id(leaf) not in self.known
                numbers.append(self._new(leaf) if own else None)
            self.tape.entries.append(Entry(path, read_args, read_kwargs, tuple(numbers), autocast))

        return leave

    # -- end ----------------------------------------------------------------------------------------------------

    def finish(self, result: Any) -> Tape:
        """Name the results and keep the values that are still as they were computed."""
        leaves, spec = pytree.tree_flatten(result)
        self.tape.outputs, self.tape.out_spec = [self._refs(leaf) for leaf in leaves], spec
        for tensor in self.alive:
            number, written = self.known[id(tensor)]
            if written == self.memories[_storage(tensor)].written:
                self.tape.values[number] = tensor
        for memory in self.memories.values():
            if _geometry(memory.keep) == memory.geometry:
                self.tape.values[memory.base] = memory.keep
        return self.tape


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: Tensor) -> tuple[list[int], list[int], int]:
    return list(tensor.shape), list(tensor.stride()), int(tensor.storage_offset())


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)


def _versions(tree: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_inference()]
