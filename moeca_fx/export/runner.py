"""Sample from an artefact: a callable with the model's signature, and its trajectories, contexts and statistics.

The runtime is that of a transformed model; only what runs a step is another. A cache is two buffers by turns: a step
reads one and writes the other.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from moeca_fx.autocast import OFF
from moeca_fx.errors import InputError
from moeca_fx.export.graph import CACHE_IN, CACHE_OUT
from moeca_fx.export.lengths import Lengths, read_lists
from moeca_fx.export.manifest import Manifest, dtype_of, read_manifest, read_port, reading_fields
from moeca_fx.export.sessions import CPU, RunOptions, open_session
from moeca_fx.passes import Compilation
from moeca_fx.runtime.flops import StepFlops
from moeca_fx.runtime.memory import MemoryReport
from moeca_fx.runtime.options import MemoryOptions
from moeca_fx.runtime.program import Program
from moeca_fx.runtime.runtime import DEFAULT_CONTEXT, Runtime
from moeca_fx.runtime.signature import Signature
from moeca_fx.runtime.statistics import Statistics


def load(
    folder: str | PathLike[str],
    *,
    providers: Sequence[str] = (CPU,),
    strict_provider: bool = True,
    threads: int | None = None,
) -> "ExportedModel":
    """Open what `moeca-fx export` wrote.

    Args:
        folder: with the artefact and its manifest.
        providers: onnxruntime's execution providers, the best first.
        strict_provider: refuse to run on another provider than the first ones.
        threads: CPU threads; None takes torch's.

    Raises:
        ExportError: the manifest is missing, newer or not that of the files; the provider is missing; or an engine
            finds no GPU that it runs on.
        MissingExtraError: onnxruntime or TensorRT is not installed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    options = RunOptions(providers, strict_provider, threads)
    with reading_fields(folder):
        loaded = {graph["name"]: _Loaded(graph, folder, manifest, options) for graph in manifest.graphs}
        return ExportedModel(manifest, loaded)


class ExportedModel:
    """An artefact as a model: call it as the model it was made from.

    Attributes:
        manifest: what it is.
        device: where its inputs must lie, and its results do.
    """

    training = False

    def __init__(self, manifest: Manifest, loaded: "Mapping[str, _Loaded]") -> None:
        self.manifest = manifest
        self.device = torch.device(next(iter(loaded.values())).session.device)
        self._runtime = _ArtefactRuntime(manifest, loaded)
        empty, kind = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._signature = inspect.Signature([inspect.Parameter(n, kind, default=empty) for n in manifest.parameters])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model.

        Raises:
            InputError: the inputs are not of the shapes, dtypes and batch that the artefact was made for.
        """
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"{self.manifest.model}: {error}; expected {self._signature}") from error
        return self._runtime.call(self, tuple(bound.arguments.values()), {})  # type: ignore[arg-type]  # no module

    def context(self, name: str) -> AbstractContextManager[None]:
        """As `TransformedModel.context`."""
        return self._runtime.context(name)

    def reset(self, context: str | None = None) -> None:
        """As `TransformedModel.reset`."""
        self._runtime.reset(context)

    def stats(self) -> Statistics:
        """As `TransformedModel.stats`."""
        return self._runtime.stats()

    def reset_stats(self) -> None:
        """As `TransformedModel.reset_stats`."""
        self._runtime.reset_stats()

    def memory(self) -> MemoryReport:
        """As `TransformedModel.memory`; a second set of buffers, for what is not written in place, is not counted."""
        return self._runtime.memory()

    def cache(self, context: str = DEFAULT_CONTEXT) -> dict[str, Tensor]:
        """As `TransformedModel.cache`."""
        return self._runtime.cache(context)


class _Loaded:
    """A graph that can be run, and the buffers that its steps take turns with."""

    def __init__(self, graph: Mapping[str, Any], folder: Path, manifest: Manifest, options: RunOptions) -> None:
        inputs = [read_port(item) for item in graph["inputs"]]
        self.outputs = [read_port(item) for item in graph["outputs"]]
        self.session = open_session(manifest.kind, folder / graph["file"], inputs, self.outputs, options)
        self.returns = [(where, value) for where, value in graph["returns"]]
        self.lengths = Lengths(read_lists(graph.get("lists", ())))
        names = [port.name for port in inputs]
        handed_on = {value for where, value in self.returns if where == "input"}
        self.replaced = []
        """For each output the position of the input whose buffer is free afterwards, or None."""
        self.in_place = set(graph.get("in_place", ())) if self.session.writes_in_place else set()
        """Outputs that are bound to that input's buffer itself."""
        for port in self.outputs:
            name = port.name.replace(CACHE_OUT, CACHE_IN)
            place = names.index(name) if name != port.name and name in names else None
            self.replaced.append(None if place in handed_on else place)
        # new value of a cache -> the buffer of its last one
        self._free: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def run(self, step: str, given: list[Tensor], batch: int) -> tuple[Any, ...]:
        """Run it as this step: results, caches, counters."""
        if self.lengths.lists:
            made = self._run_until_enough(step, given, batch)
        else:
            made = self.session.run(given, partial(self._buffers, given, batch))
        parts = {"input": given, "output": made}
        return tuple(parts[where][value] if where in parts else value for where, value in self.returns)

    def _run_until_enough(self, step: str, given: list[Tensor], batch: int) -> Sequence[Tensor]:
        """Its caches are never written in place, so a run that left something out is simply thrown away."""
        buffers = self._buffers(given, batch)
        for lengths in self.lengths.attempts(step, batch):
            made = self.session.run([*given, lengths], lambda: buffers)
            if self.lengths.enough(step, batch, lengths, made[-1]):
                return made
        raise AssertionError(f"{step}: a list is longer than all of its entries")

    def _buffers(self, given: list[Tensor], batch: int) -> list[Tensor]:
        made = []
        for port, place in zip(self.outputs, self.replaced, strict=True):
            if place is not None and port.name in self.in_place:
                made.append(given[place])
                continue
            free = None if place is None else self._free.pop(given[place], None)  # type: ignore[no-untyped-call]
            buffer = port.empty(batch, self.session.device) if free is None else free
            if place is not None:
                self._free[buffer] = given[place]
            made.append(buffer)
        return made


@dataclass(frozen=True)
class _ArtefactProgram(Program):
    """A program whose steps run in the artefact."""

    manifest: Manifest
    loaded: Mapping[str, _Loaded]

    def run(self, name: str, batch: int, *inputs: Any) -> Any:
        """See `Program.run`."""
        step = next(step for step in self.manifest.steps if step["name"] == name)
        given = [leaf.contiguous() for leaf in inputs if isinstance(leaf, Tensor)]
        if step["force"] is not None:
            given.append(torch.tensor(step["force"]))
        return self.loaded[step["graph"]].run(name, given, batch)

    def step_flops(self, leaves: list[Any], batch: int) -> StepFlops:
        """As the manifest has them."""
        return self.manifest.step_flops(batch)


class _ArtefactRuntime(Runtime):
    """The runtime over one fixed program."""

    def __init__(self, manifest: Manifest, loaded: Mapping[str, _Loaded]) -> None:
        method = manifest.method()
        super().__init__((), None if method is None else method.policy(), manifest.timestep, MemoryOptions())
        self.manifest = manifest
        self.artefact = _program(manifest, loaded)

    def _program(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Any, signature: Signature, batch: int
    ) -> Program:
        if signature[2] != OFF:
            raise InputError(
                f"{self.manifest.model}: called under autocast {signature[2]}; expected none, because an artefact "
                "computes in the dtypes that it was exported with; leave the block"
            )
        _check_call(self.manifest, pytree.tree_leaves(args))
        return self.artefact


def _program(manifest: Manifest, loaded: Mapping[str, _Loaded]) -> _ArtefactProgram:
    nothing = fx.GraphModule(nn.Module(), fx.Graph())
    return _ArtefactProgram(
        traced=Compilation(nothing, (), (), {}, None),
        plain=nothing,
        graphs=manifest.cached_graphs,
        sites=manifest.placed,
        out_spec=pytree.treespec_loads(manifest.structure),
        outputs=manifest.results,
        timestep=manifest.timestep,
        steps={},
        manifest=manifest,
        loaded=loaded,
    )


def _check_call(manifest: Manifest, leaves: list[Any]) -> None:
    """Raise `InputError` unless the flat inputs fit the manifest."""
    wanted = len(manifest.inputs) + len(manifest.constants)
    if len(leaves) != wanted:
        raise InputError(f"{manifest.model}: expected {wanted} inputs, found {len(leaves)}")
    for index, value in manifest.constants.items():
        if leaves[int(index)] != value:
            raise InputError(f"{manifest.model}: input {index} was exported as {value!r}, found {leaves[int(index)]!r}")
    tensors = [leaf for index, leaf in enumerate(leaves) if str(index) not in manifest.constants]
    least, _, most = manifest.batch
    sizes = set()
    for item, value in zip(manifest.inputs, tensors, strict=True):
        shape = list(getattr(value, "shape", []))
        fits = isinstance(value, Tensor) and len(shape) == len(item["shape"]) and value.dtype == dtype_of(item["dtype"])
        if not fits or any(w not in (h, "batch") for w, h in zip(item["shape"], shape, strict=True)):
            found = f"{list(shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{item['name']}: expected {item['shape']} {item['dtype']}, found {found}")
        sizes |= {h for w, h in zip(item["shape"], shape, strict=True) if w == "batch"}
    if len(sizes) > 1 or not all(least <= size <= most for size in sizes):
        raise InputError(
            f"{manifest.model}: exported for batches of {least} to {most}, found {sorted(sizes)}; call it in parts, or "
            "export with another --batch"
        )
