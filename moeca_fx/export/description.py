"""`describe_artefact`: what an exported model is, holds and costs, and what TensorRT would say of it; nothing runs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from moeca_fx.errors import ExportError, MissingExtraError, require
from moeca_fx.export.engine import Rejection, find_backend, parse_onnx
from moeca_fx.export.graph import CACHE_IN, CACHE_OUT, Port
from moeca_fx.export.manifest import FILE, Manifest, describe_port, read_manifest, read_port, reading_fields
from moeca_fx.export.onnx.file import EXTRA
from moeca_fx.export.plan import FULL, PROBE
from moeca_fx.export.sessions import KINDS
from moeca_fx.export.sessions.program import open_program
from moeca_fx.runtime.memory import MemoryReport, report


@dataclass(frozen=True)
class Contents:
    """What a graph's file holds.

    Attributes:
        operators: (operator, nodes of it), the most frequent first.
        tensors: weights and constants; values: numbers in them; bytes: of those, in this file or beside it.
    """

    operators: tuple[tuple[str, int], ...]
    tensors: int
    values: int
    bytes: int

    @property
    def nodes(self) -> int:
        """How many there are in all."""
        return sum(count for _, count in self.operators)


@dataclass(frozen=True)
class GraphDescription:
    """One graph of an artefact.

    Attributes:
        name, file: as in the manifest; bytes: of the file.
        inputs, outputs: of the call, without caches.
        caches_in, caches_out: names of the caches that it takes and gives; in_place: of those, what onnxruntime's CPU
            provider writes where it lies.
        lists: how many it takes the lengths of.
        steps: (step that it runs, value of its input ``force`` or None).
        contents: None where they cannot be listed.
        note: why not.
        rejections: nodes that TensorRT refuses; None where it was not asked.
    """

    name: str
    file: str
    bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    caches_in: tuple[str, ...]
    caches_out: tuple[str, ...]
    in_place: tuple[str, ...]
    lists: int
    steps: tuple[tuple[str, int | None], ...]
    contents: Contents | None
    note: str | None
    rejections: tuple[Rejection, ...] | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        contents = None
        if self.contents is not None:
            contents = {"nodes": self.contents.nodes} | asdict(self.contents)
            contents["operators"] = dict(self.contents.operators)
        return {
            "name": self.name,
            "file": self.file,
            "bytes": self.bytes,
            "inputs": [describe_port(port) for port in self.inputs],
            "outputs": [describe_port(port) for port in self.outputs],
            "caches_in": list(self.caches_in),
            "caches_out": list(self.caches_out),
            "in_place": list(self.in_place),
            "lists": self.lists,
            "steps": [{"name": name, "force": force} for name, force in self.steps],
            "contents": contents,
            "note": self.note,
            "rejections": None if self.rejections is None else [asdict(item) for item in self.rejections],
        }


@dataclass(frozen=True)
class BatchCost:
    """What a batch takes.

    Attributes:
        batch: its samples.
        cache_bytes: of all caches; running_bytes: while a step runs, which has what it reads and what it writes.
        flops: (step, FLOPs): ``uncached``, and with caches ``full``, ``probe`` if there is one, and the fixed part of
            every other step, which recomputes nothing.
    """

    batch: int
    cache_bytes: int
    running_bytes: int
    flops: tuple[tuple[str, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"flops": dict(self.flops)}


@dataclass(frozen=True)
class ArtefactDescription:
    """What `describe_artefact` found.

    Attributes:
        manifest: of the artefact.
        inputs: tensors of a call.
        files: (name, bytes) of all of them.
        graphs: in the manifest's order.
        cache: of one sample; a probing schedule's own is in it.
        batches: costs at the bounds of the batch.
        tensorrt: which TensorRT read the graphs, with its version, or None.
        note: why none did.
    """

    manifest: Manifest
    inputs: tuple[Port, ...]
    files: tuple[tuple[str, int], ...]
    graphs: tuple[GraphDescription, ...]
    cache: MemoryReport
    batches: tuple[BatchCost, ...]
    tensorrt: str | None
    note: str | None

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return KINDS[self.manifest.kind]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        manifest = self.manifest
        return {
            "kind": manifest.kind,
            "model": manifest.model,
            "dtype": manifest.dtype,
            "weights": manifest.weights,
            "batch": manifest.batch,
            "policy": manifest.policy,
            "inputs": [describe_port(port) for port in self.inputs],
            "opset": manifest.opset,
            "compute_capabilities": manifest.compute_capabilities,
            "versions": manifest.versions,
            "files": dict(self.files),
            "graphs": [graph.as_dict() for graph in self.graphs],
            "cache": self.cache.as_dict(),
            "batches": [cost.as_dict() for cost in self.batches],
            "tensorrt": {"version": self.tensorrt, "note": self.note},
        }


def describe_artefact(folder: str | PathLike[str], *, tensorrt: bool = True) -> ArtefactDescription:
    """Read what `moeca-fx export` wrote, and describe it.

    Args:
        folder: with the artefact and its manifest.
        tensorrt: let TensorRT-RTX read ONNX graphs, where it is installed, to hear which nodes it refuses.

    Returns:
        The description; what could not be looked at says why.

    Raises:
        ExportError: the manifest is missing, damaged or newer, or the files are not those that it describes.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.kind not in KINDS:
        known = ", ".join(KINDS)
        raise ExportError(f"{folder / FILE}: kind: expected one of {known}, found {manifest.kind!r}; export again")
    version, note = _tensorrt(manifest.kind, tensorrt)
    with reading_fields(folder):
        least, best, most = manifest.batch
        manifest.method()  # or it raises what is wrong with the policy
        graphs = tuple(_graph(graph, manifest, folder, version is not None) for graph in manifest.graphs)
        return ArtefactDescription(
            manifest=manifest,
            inputs=tuple(read_port(item) for item in manifest.inputs),
            files=tuple((name, (folder / name).stat().st_size) for name in manifest.files),
            graphs=graphs,
            cache=_cache(manifest, 1),
            batches=tuple(_cost(manifest, graphs, batch) for batch in dict.fromkeys((least, best, most))),
            tensorrt=version,
            note=note,
        )


def _tensorrt(kind: str, wanted: bool) -> tuple[str | None, str | None]:
    """(name and version of what will read the graphs, why nothing will)."""
    if kind != "onnx":
        return None, "TensorRT reads ONNX alone"
    if not wanted:
        return None, "left out on request"
    try:
        name, module = find_backend("tensorrt-rtx")
    except MissingExtraError as error:
        return None, str(error)
    return f"{name} {module.__version__}", None


def _graph(graph: Mapping[str, Any], manifest: Manifest, folder: Path, parse: bool) -> GraphDescription:
    if graph["file"] not in manifest.files:
        raise ExportError(
            f"{folder / FILE}: the graph {graph['name']} is in {graph['file']!r}, which is none of its files "
            f"({', '.join(manifest.files)}); export the model again"
        )
    path = folder / graph["file"]
    inputs, outputs = ([read_port(item) for item in graph[way]] for way in ("inputs", "outputs"))
    contents, note = _contents(manifest.kind, path)
    return GraphDescription(
        name=graph["name"],
        file=graph["file"],
        bytes=path.stat().st_size,
        inputs=tuple(port for port in inputs if not port.name.startswith(CACHE_IN)),
        outputs=tuple(port for port in outputs if not port.name.startswith(CACHE_OUT)),
        caches_in=_caches(inputs, CACHE_IN),
        caches_out=_caches(outputs, CACHE_OUT),
        in_place=tuple(name.removeprefix(CACHE_OUT) for name in graph.get("in_place", ())),
        lists=len(graph.get("lists", ())),
        steps=tuple((step["name"], step["force"]) for step in manifest.steps if step["graph"] == graph["name"]),
        contents=contents,
        note=note,
        rejections=parse_onnx(path, "tensorrt-rtx").rejections if parse else None,
    )


def _caches(ports: list[Port], prefix: str) -> tuple[str, ...]:
    return tuple(port.name.removeprefix(prefix) for port in ports if port.name.startswith(prefix))


# -- costs --------------------------------------------------------------------------------------------------------


def _cache(manifest: Manifest, batch: int) -> MemoryReport:
    graphs = manifest.cached_graphs
    probe = () if graphs is None or graphs.probe is None else (graphs.probe.state,)
    return report(((state, state.bytes(batch)) for state in (*manifest.states, *probe)), batch)


def _cost(manifest: Manifest, graphs: tuple[GraphDescription, ...], batch: int) -> BatchCost:
    cache = _cache(manifest, batch)
    replaced = {
        name for graph in graphs for name in graph.caches_in if name in graph.caches_out and name not in graph.in_place
    }
    written = sum(size for name, size in cache.states if name in replaced)
    flops = manifest.step_flops(batch)
    found = {"uncached": flops.uncached.fixed}
    if manifest.cached:
        found["full"] = flops.full.fixed
        if manifest.probe is not None:
            found["probe"] = flops.probe
        rules = [step["name"] for step in manifest.steps if step["name"] not in (FULL, PROBE)]
        found |= {name: rule.fixed for name, rule in zip(rules, flops.rules, strict=True)}
    return BatchCost(batch, cache.total, cache.total + written, tuple(found.items()))


# -- contents -----------------------------------------------------------------------------------------------------


def _contents(kind: str, path: Path) -> tuple[Contents | None, str | None]:
    """(what a file holds, why that is not known)."""
    if kind == "pt2":
        return _program_contents(path), None
    if kind != "onnx":
        return None, f"{KINDS[kind]} is compiled: its nodes cannot be listed"
    try:
        require("onnx_ir", EXTRA)
    except MissingExtraError as error:
        return None, f"its nodes cannot be listed: {error}"
    return _onnx_contents(path), None


def _onnx_contents(path: Path) -> Contents:
    import onnx_ir

    try:
        model: Any = onnx_ir.load(path)
    except Exception as error:  # protobuf's errors are none of a public type
        raise ExportError(f"{path}: is no ONNX file that onnx reads: {error}; export again") from error
    nodes = [node for part in (model.graph, *model.functions.values()) for node in part.all_nodes()]
    held = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return Contents(
        _by_frequency(Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)),
        len(held),
        sum(tensor.size for tensor in held),
        sum(tensor.nbytes for tensor in held),
    )


def _program_contents(path: Path) -> Contents:
    program = open_program(path)
    calls = Counter(_operator(node.target) for node in program.graph.nodes if node.op == "call_function")
    tensors = [*program.state_dict.values(), *program.constants.values()]
    places = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors if isinstance(t, torch.Tensor)}
    held = list(places.values())  # one of two names is there once
    return Contents(
        _by_frequency(calls),
        len(held),
        sum(tensor.numel() for tensor in held),
        sum(tensor.numel() * tensor.element_size() for tensor in held),
    )


def _operator(target: Any) -> str:
    """``aten.add`` for each of its overloads, ``getitem`` for Python's own."""
    return str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else str(target.__name__)


def _by_frequency(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
