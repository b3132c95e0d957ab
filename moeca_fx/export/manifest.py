"""``manifest.json``: what an artefact is, takes and gives; the runner needs nothing else beside the artefact.

docs/manifest.schema.json describes the fields. `FORMAT` counts versions: a runner refuses newer ones.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from moeca_fx.errors import ConfigError, ExportError, MoecaError
from moeca_fx.export.graph import BATCH, ExportGraph, Port
from moeca_fx.export.lengths import LENGTHS, NEEDED, GivenList, describe_lists
from moeca_fx.export.plan import FULL, PROBE, ExportPlan, ExportStep
from moeca_fx.files import write_whole
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite, Sites, kind_of
from moeca_fx.graph.state import Counter, StateSpec
from moeca_fx.passes.cache.graphs import CachedGraphs, ProbeGraph, StepGraph
from moeca_fx.policies.policy import Method
from moeca_fx.policies.registry import NAME_KEY, build
from moeca_fx.provenance import fingerprint, provenance
from moeca_fx.runtime.flops import StepCost, StepFlops

FORMAT = 3
FILE = "manifest.json"
_SITES = {"attention": AttentionSite, "moe": MoESite, "dense_ffn": DenseFFNSite}


@dataclass(frozen=True)
class GraphFacts:
    """What became of a graph when it was written.

    Attributes:
        in_place: caches, by their outputs, that are written where they lie.
        lists: whose lengths it takes as an input.
    """

    in_place: Sequence[str] = ()
    lists: Sequence[GivenList] = ()


@dataclass(frozen=True)
class Manifest:
    """See the module's docstring; every field is JSON.

    Attributes:
        format: version of this file.
        kind: what runs it: see `moeca_fx.export.sessions`.
        files: all files of the artefact with their SHA-256.
        model: class of the source model; weights: fingerprint of its parameters and buffers.
        dtype: of its parameters; batch: least, best and most samples of a call.
        policy: the method's name and fields, under ``policy`` its name; None without caches.
        timestep: position of the timestep among the call's leaves; None without caches.
        parameters: names of forward's parameters in the order of the inputs.
        inputs: tensors of a call; constants: values of its leaves that are no tensors, by position.
        structure: of the result, as torch's pytree writes it; results: how many leaves it has.
        caches: what is kept between steps; probe: what an adaptive schedule keeps besides, or None.
        graphs: each with its file, inputs, outputs, and where a step finds what it hands back.
        steps: which graph runs which step, and what that counts.
        sites: what the model's places do; flops: of steps, by batch.
        sampler: how the command samples the model, where it can (`cli.flow.Flow`).
        compute_capabilities: that an engine was built for.
        versions: of what made it.
    """

    format: int
    kind: str
    files: dict[str, str]
    model: str
    weights: str
    dtype: str
    batch: list[int]
    policy: dict[str, Any] | None
    timestep: int | None
    parameters: list[str]
    inputs: list[dict[str, Any]]
    constants: dict[str, Any]
    structure: str
    results: int
    caches: list[dict[str, Any]]
    probe: dict[str, Any] | None
    graphs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    sites: list[dict[str, Any]]
    flops: dict[str, Any]
    sampler: dict[str, Any] | None = None
    opset: int | None = None
    compute_capabilities: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def cached(self) -> bool:
        """Whether the artefact keeps caches from step to step."""
        return bool(self.caches)

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """Its caches."""
        return tuple(_state(cache) for cache in self.caches)

    @property
    def placed(self) -> Sites:
        """The model's sites."""
        return Sites(
            tuple(_SITES[s["site_kind"]](**{k: v for k, v in s.items() if k != "site_kind"}) for s in self.sites)
        )

    @property
    def cached_graphs(self) -> CachedGraphs | None:
        """Steps without their graphs, as the runtime asks for them."""
        if not self.cached:
            return None
        found = {step["name"]: self._step(step) for step in self.steps}
        probe = None
        if self.probe is not None:
            probe = ProbeGraph(_nothing(), _state(self.probe), self.probe["every_step"])
        rules = tuple(step for name, step in found.items() if name not in (FULL, PROBE))
        return CachedGraphs(found[FULL], rules, self.states, probe)

    def _step(self, step: Mapping[str, Any]) -> StepGraph:
        reads = tuple(state for state in self.states if state.name in step["reads"])
        counters = tuple(Counter(site, kind) for site, kind in step["counters"])
        actions = tuple((path, action) for path, action in step["actions"])
        return StepGraph(step["name"], _nothing(), reads, step["clock"], step["prefix"], counters, actions)

    def with_facts(self, facts: Mapping[str, GraphFacts]) -> "Manifest":
        """With what became of its graphs, by name."""
        graphs = [_with_facts(graph, facts.get(graph["name"], GraphFacts())) for graph in self.graphs]
        return dataclasses.replace(self, graphs=graphs)

    def step_flops(self, batch: int) -> StepFlops:
        """FLOPs of the steps, which grow with the batch."""
        at = {key: int(value[0] + value[1] * batch) for key, value in self.flops["by_batch"].items()}
        rules = tuple(
            StepCost(at[f"rule {index}"], {Counter(site, kind): cost for site, kind, cost in each})
            for index, each in enumerate(self.flops["each"])
        )
        return StepFlops(StepCost(at["uncached"], {}), StepCost(at["full"], {}), at["probe"], rules)

    def method(self) -> Method | None:
        """The policy that it was made for.

        Raises:
            ExportError: this version does not know it.
        """
        if self.policy is None:
            return None
        values = {key: value for key, value in self.policy.items() if key != NAME_KEY}
        try:
            return build(self.policy[NAME_KEY], **values)
        except ConfigError as error:
            raise ExportError(f"manifest: policy: {error}; export the model again with this version") from error


def _nothing() -> fx.GraphModule:
    return fx.GraphModule(nn.Module(), fx.Graph())


def describe(
    plan: ExportPlan,
    method: Method | None,
    kind: str,
    ending: str,
    batch: Sequence[int],
    opset: int | None,
    sampler: dict[str, Any] | None,
) -> Manifest:
    """The manifest of a plan whose graphs become files of their names and this ending, before they are written."""
    program = plan.program
    model = program.traced.model
    state = model.state_dict()
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    probe = plan.probe
    return Manifest(
        format=FORMAT,
        kind=kind,
        files={},
        model=type(model).__name__,
        weights=fingerprint(*(part for pair in state.items() for part in pair)),
        dtype=_name(next(iter(dtypes))) if len(dtypes) == 1 else "mixed",
        batch=list(batch),
        policy=None if method is None else {NAME_KEY: method.method, **method.as_dict()},
        timestep=program.timestep,
        parameters=list(plan.parameters),
        inputs=[describe_port(port) for port in plan.call_ports],
        constants={str(index): _plain(value, f"input {index}") for index, value in plan.constants.items()},
        structure=_structure(program.out_spec),
        results=program.outputs,
        caches=[_cache(state) for state in plan.states],
        probe=None if probe is None else {**_cache(probe.state), "every_step": probe.every_step},
        graphs=[_graph(graph, ending) for graph in plan.graphs],
        steps=[_described(step) for step in plan.steps],
        sites=[{"site_kind": kind_of(site), **dataclasses.asdict(site)} for site in program.sites.ordered],
        flops=_flops(plan),
        sampler=sampler,
        opset=opset,
        versions=provenance()["versions"],
    )


def _structure(spec: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, ValueError) as error:
        raise ExportError(
            f"export: the model's result cannot be described: {error}; export a wrapper that returns tensors, or "
            "tuples or dicts of them"
        ) from error


def describe_port(port: Port) -> dict[str, Any]:
    """A port as a manifest describes it."""
    return {"name": port.name, "shape": list(port.shape), "dtype": _name(port.dtype)}


def read_port(item: Mapping[str, Any]) -> Port:
    """The port that a manifest describes."""
    return Port(item["name"], tuple(item["shape"]), dtype_of(item["dtype"]))


def _cache(state: StateSpec) -> dict[str, Any]:
    return {
        "site": state.site,
        "kind": state.kind,
        "shape": [BATCH, *state.shape],
        "dtype": _name(state.dtype),
        "empty": state.empty,
        "carried": state.carried,
        "bytes_per_sample": state.bytes(1),
    }


def _state(cache: Mapping[str, Any]) -> StateSpec:
    return StateSpec(
        cache["site"], cache["kind"], tuple(cache["shape"][1:]), dtype_of(cache["dtype"]), cache["carried"]
    )


def _graph(graph: ExportGraph, ending: str) -> dict[str, Any]:
    return {
        "name": graph.name,
        "file": graph.name + ending,
        "inputs": [describe_port(port) for port in graph.inputs],
        "outputs": [describe_port(port) for port in graph.outputs],
        "returns": [[where, _plain(value, "a result")] for where, value in graph.returns],
    }


def _with_facts(graph: Mapping[str, Any], facts: GraphFacts) -> dict[str, Any]:
    described = {**graph, "in_place": list(facts.in_place), "lists": describe_lists(facts.lists)}
    if facts.lists:
        for way, name in (("inputs", LENGTHS), ("outputs", NEEDED)):
            described[way] = [*graph[way], describe_port(Port(name, (len(facts.lists),), torch.int64))]
    return described


def _described(step: ExportStep) -> dict[str, Any]:
    return {
        "name": step.name,
        "graph": step.graph,
        "force": step.force,
        "reads": [state.name for state in step.reads],
        "clock": step.clock,
        "prefix": step.prefix,
        "counters": [[counter.site, counter.kind] for counter in step.counters],
        "actions": [list(pair) for pair in step.actions],
    }


def _flops(plan: ExportPlan) -> dict[str, Any]:
    """Measured on the graphs of the program: constant and by sample, and for a unit of each counter."""
    program = plan.program
    found = [program.step_flops(plan.with_constants(plan.call(batch)), batch) for batch in (2, 3)]
    at = [
        {"uncached": flops.uncached.fixed, "full": flops.full.fixed, "probe": flops.probe}
        | {f"rule {index}": rule.fixed for index, rule in enumerate(flops.rules)}
        for flops in found
    ]
    by_batch = {key: [3 * at[0][key] - 2 * at[1][key], at[1][key] - at[0][key]] for key in at[0]}
    each = [[[c.site, c.kind, cost] for c, cost in rule.each.items()] for rule in found[0].rules]
    return {"by_batch": by_batch, "each": each}


def _plain(value: Any, what: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ExportError(
        f"export: {what} is a {type(value).__name__}; expected a tensor or a plain value, which a manifest can hold"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype that a manifest names.

    Raises:
        ExportError: it is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ExportError(f"manifest: expected a dtype such as 'float32', found {name!r}; export the model again")
    return found


# -- files --------------------------------------------------------------------------------------------------------


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write it, with the hash of every file of the artefact."""
    names = sorted(path.name for path in folder.iterdir() if path.name != FILE)
    whole = dataclasses.replace(manifest, files={name: sha256(folder / name) for name in names})
    text = json.dumps(dataclasses.asdict(whole), indent=2) + "\n"
    write_whole(folder / FILE, lambda path: path.write_text(text, encoding="utf-8"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of an artefact, and that its files are those that it was written with.

    Raises:
        ExportError: missing, damaged or newer; or the files are others.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExportError(f"{path}: cannot be read: {error}; expected what moeca-fx export writes") from error
    manifest = _checked(content, path)
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ExportError(f"{file}: is missing, {path.name} lists it; copy the whole folder or export again")
        if sha256(file) != expected:
            raise ExportError(f"{file}: is not the file that {path.name} describes (damaged or replaced); export again")
    return manifest


@contextmanager
def reading_fields(folder: Path) -> Iterator[None]:
    """Inside the block what a manifest's damaged field makes code stumble over is one clear error.

    Raises:
        ExportError: it did.
    """
    try:
        yield
    except MoecaError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ExportError(
            f"{folder / FILE}: a field is damaged ({type(error).__name__}: {error}); export the model again"
        ) from error


def _checked(content: Any, path: Path) -> Manifest:
    if not isinstance(content, Mapping) or not isinstance(content.get("format"), int):
        raise ExportError(f"{path}: expected a mapping with the field 'format', found something else; export again")
    if content["format"] > FORMAT:
        raise ExportError(
            f"{path}: format {content['format']} is newer than what this moeca_fx reads ({FORMAT}); update moeca_fx"
        )
    known = {item.name: item for item in dataclasses.fields(Manifest)}
    missing = [
        name
        for name, item in known.items()
        if name not in content and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    unknown = [name for name in content if name not in known]
    if missing or unknown:
        raise ExportError(f"{path}: missing {missing or 'none'}, unknown {unknown or 'none'}; export the model again")
    odd = [name for name, item in known.items() if name in content and not _fits(content[name], item.type)]
    if odd:
        raise ExportError(f"{path}: {', '.join(odd)}: not of the type that the field has; export the model again")
    return Manifest(**content)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is of a field's type, as far as the outermost goes."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return isinstance(value, tuple(get_origin(each) or each for each in kinds))


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
