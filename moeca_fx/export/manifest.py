"""``manifest.json``: what an artefact is, takes and gives; the runner needs nothing else beside the artefact.

docs/manifest.schema.json describes the fields. `FORMAT` counts versions: a runner refuses newer ones.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.errors import ConfigError, ExportError
from moeca_fx.export.step import COUNTERS, FORCE, ExportStep
from moeca_fx.files import write_whole
from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.sites import AttentionSite, DenseFFNSite, MoESite, Sites, kind_of
from moeca_fx.graph.state import Counter, StateSpec
from moeca_fx.policies.policy import Method
from moeca_fx.policies.registry import NAME_KEY, build
from moeca_fx.provenance import fingerprint, provenance
from moeca_fx.runtime.flops import RuleFlops, StepFlops, measure_step_flops

FORMAT = 1
FILE = "manifest.json"
_SITES = {"attention": AttentionSite, "moe": MoESite, "dense_ffn": DenseFFNSite}
_BATCH = "batch"


@dataclass(frozen=True)
class Manifest:
    """See the module's docstring; every field is JSON.

    Attributes:
        format: version of this file.
        kind: ``"onnx"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
        file: the artefact's name; files: all its files with their SHA-256.
        model: class of the source model; weights: fingerprint of its parameters and buffers.
        dtype: of its parameters; batch: least, best and most samples of a call.
        policy: the method's name and fields, under ``policy`` its name; None without caches.
        timestep: position of the timestep among the call's leaves; None without caches.
        parameters: names of forward's parameters in the order of the inputs.
        inputs, outputs, caches, counters: what goes in and comes out, by name.
        constants: values of the call's leaves that are no tensors, by position.
        results: for each leaf of the result its position among the outputs, or its value.
        structure: of the result, as torch's pytree writes it.
        sites: what the model's places do; flops: of steps, by batch.
        sampler: how the command samples the model, where it can (`cli.flow.Flow`).
        compute_capabilities: that an engine was built for.
        versions: of what made it.
    """

    format: int
    kind: str
    file: str
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
    outputs: list[dict[str, Any]]
    results: list[list[Any]]
    structure: str
    caches: list[dict[str, Any]]
    counters: list[list[str]]
    sites: list[dict[str, Any]]
    actions: list[list[str]]
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
    def graph_inputs(self) -> list[str]:
        """Names of the graph's inputs, in order."""
        caches = [cache["input"] for cache in self.caches]
        return [*(item["name"] for item in self.inputs), *caches, *([FORCE] if self.cached else [])]

    @property
    def graph_outputs(self) -> list[str]:
        """Names of the graph's outputs, in order."""
        caches = [cache["output"] for cache in self.caches]
        return [*(item["name"] for item in self.outputs), *caches, *([COUNTERS] if self.cached else [])]

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """Its caches. All are inputs of a full step too, so all are carried."""
        return tuple(
            StateSpec(c["site"], c["kind"], tuple(c["shape"][1:]), dtype_of(c["dtype"]), carried=True)
            for c in self.caches
        )

    @property
    def counted(self) -> tuple[Counter, ...]:
        """What the counters count."""
        return tuple(Counter(site, kind) for site, kind in self.counters)

    @property
    def placed(self) -> Sites:
        """The model's sites."""
        return Sites(
            tuple(_SITES[s["site_kind"]](**{k: v for k, v in s.items() if k != "site_kind"}) for s in self.sites)
        )

    def step_flops(self, batch: int) -> StepFlops:
        """FLOPs of the steps, which grow with the batch."""
        at = {key: int(value[0] + value[1] * batch) for key, value in self.flops["by_batch"].items()}
        each = {Counter(site, kind): cost for site, kind, cost in self.flops["each"]}
        rules = (RuleFlops(at["cached"], each),) if self.cached else ()
        return StepFlops(at["uncached"], at["full"], 0, rules)

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


def describe(
    step: ExportStep,
    method: Method | None,
    kind: str,
    file: str,
    batch: Sequence[int],
    opset: int,
    sampler: dict[str, Any] | None,
) -> Manifest:
    """The manifest of a step, before its files are written."""
    program = step.program
    model = program.traced.model
    state = model.state_dict()
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    made = provenance()["versions"]
    return Manifest(
        format=FORMAT,
        kind=kind,
        file=file,
        files={},
        model=type(model).__name__,
        weights=fingerprint(*(part for pair in state.items() for part in pair)),
        dtype=_name(next(iter(dtypes))) if len(dtypes) == 1 else "mixed",
        batch=list(batch),
        policy=None if method is None else {NAME_KEY: method.method, **method.as_dict()},
        timestep=program.timestep,
        parameters=list(step.parameters),
        inputs=[_tensor(name, value, step.is_batched(value)) for name, value in step.inputs.items()],
        constants={str(index): _plain(value, f"input {index}") for index, value in step.constants.items()},
        outputs=_outputs(step),
        results=[[where, _plain(value, "a result")] for where, value in step.results],
        structure=_structure(program.out_spec),
        caches=[_cache(state) for state in step.states],
        counters=[[counter.site, counter.kind] for counter in step.counters],
        sites=[{"site_kind": kind_of(site), **dataclasses.asdict(site)} for site in program.sites.ordered],
        actions=[list(pair) for pair in program.graphs.rules[0].actions] if program.graphs is not None else [],
        flops=_flops(step),
        sampler=sampler,
        opset=opset,
        versions=made,
    )


def _structure(spec: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, ValueError) as error:
        raise ExportError(
            f"export: the model's result cannot be described: {error}; export a wrapper that returns tensors, or "
            "tuples or dicts of them"
        ) from error


def _tensor(name: str, value: Tensor, batched: bool) -> dict[str, Any]:
    shape = [_BATCH, *value.shape[1:]] if batched else list(value.shape)
    return {"name": name, "shape": shape, "dtype": _name(value.dtype)}


def _outputs(step: ExportStep) -> list[dict[str, Any]]:
    """The tensors of the result; an open size is the batch's."""
    values: Any = step.module.graph.output_node().args[0]
    made = []
    for name, node in zip(step.output_names, values, strict=True):
        value = example_value(node)
        if name.startswith("cache_out.") or name == COUNTERS:
            break
        shape = [size if isinstance(size, int) else _BATCH for size in value.shape]
        if any(size == _BATCH for size in shape[1:]):
            raise ExportError(
                f"export: {name} has the batch in the shape {list(value.shape)}, expected it in front alone"
            )
        made.append({"name": name, "shape": shape, "dtype": _name(value.dtype)})
    return made


def _cache(state: StateSpec) -> dict[str, Any]:
    return {
        "site": state.site,
        "kind": state.kind,
        "input": f"cache_in.{state.name}",
        "output": f"cache_out.{state.name}",
        "shape": [_BATCH, *state.shape],
        "dtype": _name(state.dtype),
        "empty": state.empty,
        "bytes_per_sample": state.bytes(1),
    }


def _flops(step: ExportStep) -> dict[str, Any]:
    """Measured on the graphs of the program: constant and by sample, and for a unit of each counter."""
    program = step.program
    found = []
    for batch in (2, 3):
        leaves = step.with_constants(step.examples(batch)[: len(step.inputs)])
        found.append(measure_step_flops(program.plain, program.graphs, leaves, batch))
    at = [{"uncached": f.uncached, "full": f.full, **({"cached": f.rules[0].fixed} if f.rules else {})} for f in found]
    by_batch = {key: [3 * at[0][key] - 2 * at[1][key], at[1][key] - at[0][key]] for key in at[0]}
    each = found[0].rules[0].each if found[0].rules else {}
    return {"by_batch": by_batch, "each": [[c.site, c.kind, cost] for c, cost in each.items()]}


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
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith(manifest.file))
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
