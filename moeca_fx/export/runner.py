"""Sample from an artefact: a callable with the model's signature, and its trajectories, contexts and statistics.

The runtime is that of a transformed model; only what runs a step is another. Caches are two sets of buffers by turns:
a step reads one and writes the other.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from moeca_fx.errors import ExportError, InputError
from moeca_fx.export.manifest import FILE, Manifest, dtype_of, read_manifest
from moeca_fx.export.session import CPU, OnnxSession
from moeca_fx.passes import Compilation
from moeca_fx.passes.cache.graphs import CachedGraphs, StepGraph
from moeca_fx.runtime.flops import StepFlops
from moeca_fx.runtime.memory import MemoryReport
from moeca_fx.runtime.options import MemoryOptions
from moeca_fx.runtime.program import Program, Signature
from moeca_fx.runtime.runtime import DEFAULT_CONTEXT, Runtime
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
        ExportError: the manifest is missing, newer or not that of the files, or the provider is missing.
        MissingExtraError: onnxruntime is not installed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.kind != "onnx":
        raise ExportError(
            f"{folder}: holds a {manifest.kind} engine, which load cannot run yet; export the model as ONNX"
        )
    session = OnnxSession(folder / manifest.file, providers, strict=strict_provider, threads=threads)
    try:
        _check_names(manifest, session)
        return ExportedModel(manifest, session)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ExportError(
            f"{folder / FILE}: a field is damaged ({type(error).__name__}: {error}); export the model again"
        ) from error


class ExportedModel:
    """An artefact as a model: call it as the model it was made from; `manifest` says what it is."""

    training = False

    def __init__(self, manifest: Manifest, session: OnnxSession) -> None:
        self.manifest = manifest
        self._runtime = _ArtefactRuntime(manifest, session)
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
        """As `TransformedModel.memory`; the second set of buffers is as large again."""
        return self._runtime.memory()

    def cache(self, context: str = DEFAULT_CONTEXT) -> dict[str, Tensor]:
        """As `TransformedModel.cache`."""
        return self._runtime.cache(context)


@dataclass(frozen=True)
class _ArtefactProgram(Program):
    """A program whose steps run in the artefact."""

    manifest: Manifest
    session: OnnxSession
    partners: WeakTensorKeyDictionary  # the first of a set of buffers -> the set that it was read from

    def run(self, name: str, batch: int, *inputs: Any) -> Any:
        """See `Program.run`; the full step is a forced one."""
        manifest = self.manifest
        leaves = len(manifest.inputs) + len(manifest.constants)
        call = [leaf.contiguous() for leaf in inputs[:leaves] if isinstance(leaf, Tensor)]
        held = list(inputs[leaves:])
        force = [torch.tensor(int(name == "full"))] if manifest.cached else []
        results, states = self._results(batch), self._next(held)
        counters = [torch.empty(len(manifest.counters), dtype=torch.int64)] if manifest.cached else []
        self.session.run(
            dict(zip(manifest.graph_inputs, [*call, *held, *force], strict=True)),
            dict(zip(manifest.graph_outputs, [*results, *states, *counters], strict=True)),
        )
        made = [results[value] if where == "output" else value for where, value in manifest.results]
        return (*made, *states, *counters)

    def _next(self, held: list[Tensor]) -> list[Tensor]:
        """The other set of buffers."""
        if not held:
            return []
        states: list[Tensor] | None = self.partners.pop(held[0], None)  # type: ignore[no-untyped-call]  # of torch
        if states is None:
            states = [torch.empty_like(tensor) for tensor in held]
        self.partners[states[0]] = held
        return states

    def _results(self, batch: int) -> list[Tensor]:
        return [
            torch.empty([batch if size == "batch" else size for size in item["shape"]], dtype=dtype_of(item["dtype"]))
            for item in self.manifest.outputs
        ]

    def step_flops(self, leaves: list[Any], batch: int) -> StepFlops:
        """As the manifest has them."""
        return self.manifest.step_flops(batch)


class _ArtefactRuntime(Runtime):
    """The runtime over one fixed program."""

    def __init__(self, manifest: Manifest, session: OnnxSession) -> None:
        method = manifest.method()
        super().__init__((), None if method is None else method.policy(), manifest.timestep, MemoryOptions())
        self.manifest = manifest
        self.fixed = _program(manifest, session)

    def _program(self, model: nn.Module, args: tuple[Any, ...], kwargs: Any, signature: Signature) -> Program:
        _check_call(self.manifest, pytree.tree_leaves(args))
        return self.fixed


def _program(manifest: Manifest, session: OnnxSession) -> _ArtefactProgram:
    nothing = fx.GraphModule(nn.Module(), fx.Graph())
    graphs = None
    if manifest.cached:
        states, actions = manifest.states, tuple((path, action) for path, action in manifest.actions)
        full = StepGraph("full", nothing, states, False, False, (), tuple((path, "full") for path, _ in actions))
        graphs = CachedGraphs(full, (replace(full, name="cached", counters=manifest.counted, actions=actions),), states)
    return _ArtefactProgram(
        traced=Compilation(nothing, (), (), {}, None),
        plain=nothing,
        graphs=graphs,
        sites=manifest.placed,
        out_spec=pytree.treespec_loads(manifest.structure),
        outputs=len(manifest.results),
        timestep=manifest.timestep,
        steps={},
        manifest=manifest,
        session=session,
        partners=WeakTensorKeyDictionary(),
    )


def _check_names(manifest: Manifest, session: OnnxSession) -> None:
    given, made = manifest.graph_inputs, manifest.graph_outputs
    if session.inputs != given or session.outputs != made:
        odd = sorted(set(session.inputs) ^ set(given) | set(session.outputs) ^ set(made))
        raise ExportError(f"{manifest.file} and its manifest differ in inputs and outputs: {odd}; export again")


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
