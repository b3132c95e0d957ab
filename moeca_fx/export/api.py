"""`to_onnx`, `to_tensorrt`, `to_pt2`, `to_aotinductor`: transform, write graphs and manifest, prove them."""

import copy
import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.errors import ConfigError, ExportError, MoecaError
from moeca_fx.export.engine import Backend, Progress, build_engine, find_backend
from moeca_fx.export.manifest import Manifest, describe, read_manifest, write_manifest
from moeca_fx.export.onnx.file import OPSET, make_onnx, save_onnx
from moeca_fx.export.package import save_package
from moeca_fx.export.plan import ExportPlan, Form, build_plan, exportable_rule
from moeca_fx.export.runner import load
from moeca_fx.export.sessions.onnx import NO_BF16
from moeca_fx.export.trace import trace
from moeca_fx.export.verify import Verification, verify
from moeca_fx.files import prepare_folder
from moeca_fx.passes.lower_export import Experts
from moeca_fx.policies import Method, MoECa
from moeca_fx.policies.registry import as_method
from moeca_fx.sizes import readable_bytes
from moeca_fx.transform import transform

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DEFAULT = MoECa()
_ROOM = 2**20  # bytes of graphs and manifest
_UNROLLED: Experts = "unrolled"
Say = Callable[[str], object]


class ExportOptions(TypedDict, total=False):
    """What every export takes beside its own options.

    Attributes:
        batch: least, best and most samples of a call, or one number for all three; (1, 8, 32) by default.
        timestep: as for `moeca_fx.transform`.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``: a copy of the model is cast to it, and inputs of more than one axis
            (latents; a timestep keeps its precision). Scores, thresholds and activation maps stay in fp32, the router
            in what the model computes it in. None leaves the model as it is.
        check: run the artefact against PyTorch over a few steps before it is done; on by default.
        sampler: what the manifest shall say of the model's sampler; `moeca-fx run` reads it.
        progress: called with a word or two before each stage.
    """

    batch: int | Sequence[int]
    timestep: str | int | None
    dtype: str | None
    check: bool
    sampler: dict[str, Any] | None
    progress: Say | None


def to_onnx(
    model: nn.Module,
    folder: str | PathLike[str],
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | str | PathLike[str] | None = _DEFAULT,
    *,
    graphs: Form = "auto",
    experts: Experts | Literal["auto"] = "auto",
    opset: int = OPSET,
    external_data: bool = True,
    **options: Unpack[ExportOptions],
) -> Manifest:
    """Export a model with its caches as named inputs and outputs.

    Args:
        model: as for `moeca_fx.transform`.
        folder: gets the graphs, their weights and ``manifest.json``, all of them or none.
        example_inputs, example_kwargs: inputs of one forward call.
        policy: a method, also by name or from a file; None exports the model without caches.
        graphs: ``"one"`` graph for full and cached steps, which holds the weights once (MoECa with held features),
            ``"steps"``: a graph a step, or ``"auto"``: one where that is possible.
        experts: ``"unrolled"``, which ``"auto"`` is: one product an expert, of its rows alone; ``"padded"``: one over a
            table as wide as the largest group, for GPUs and TensorRT; ``"dense"``: every expert on every row.
        opset: version of ONNX's operators.
        external_data: weights in a file beside the graphs, which those over 2 GB need.
        options: see `ExportOptions`.

    Returns:
        What was written.

    Raises:
        ExportError: the policy or model has no form for export, or the artefact does not compute the same.
        ConfigError: an option is out of range.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        MoecaError: what `transform` raises, or the folder cannot be written.
    """
    if graphs == "compiled":
        raise ConfigError("graphs: 'compiled' is AOTInductor's form; ONNX takes auto, one or steps")
    request = _request(
        model,
        folder,
        example_inputs,
        example_kwargs,
        policy,
        graphs,
        options,
        _UNROLLED if experts == "auto" else experts,
    )
    if options.get("check", True) and next(request.model.parameters()).dtype is torch.bfloat16:
        raise ExportError(f"export to ONNX: {NO_BF16}")

    def write(plan: ExportPlan, made: Path) -> None:
        request.say("tracing and translating to ONNX")
        models = {graph.name: make_onnx(graph, request.sizes[2], opset, plan.program.sites) for graph in plan.graphs}
        request.say("writing")
        save_onnx(models, made, external_data)

    return request.export("onnx", ".onnx", write, opset)


def to_pt2(
    model: nn.Module,
    folder: str | PathLike[str],
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | str | PathLike[str] | None = _DEFAULT,
    *,
    graphs: Form = "auto",
    experts: Experts = "padded",
    **options: Unpack[ExportOptions],
) -> Manifest:
    """Export a model as torch.export's programs, ``<name>.pt2``, which need nothing but torch.

    Args, returns and errors are those of `to_onnx`; experts are padded or dense, and every file holds its weights.
    """
    if graphs == "compiled":
        raise ConfigError("graphs: 'compiled' is AOTInductor's form; .pt2 takes auto, one or steps")
    _refuse_unrolled(experts, ".pt2")
    request = _request(model, folder, example_inputs, example_kwargs, policy, graphs, options, experts)

    def write(plan: ExportPlan, made: Path) -> None:
        for graph in plan.graphs:
            request.say(f"tracing the graph {graph.name}")
            torch.export.save(trace(graph, request.sizes[2]), made / f"{graph.name}.pt2")

    return request.export("pt2", ".pt2", write)


def to_aotinductor(
    model: nn.Module,
    folder: str | PathLike[str],
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | str | PathLike[str] | None = _DEFAULT,
    **options: Unpack[ExportOptions],
) -> Manifest:
    """Compile a model ahead of time with AOTInductor: a package for each step, as `torch.compile` would run it.

    Packages run on the kind of machine, and with the version of torch and of moeca_fx's kernels, that made them. Each
    holds the weights that its step reads.

    Args, returns and errors are those of `to_onnx`.

    Raises:
        ExportError: there is no compiler, or it fails.
    """
    request = _request(model, folder, example_inputs, example_kwargs, policy, "compiled", options)

    def write(plan: ExportPlan, made: Path) -> None:
        for graph in plan.graphs:
            request.say(f"compiling the graph {graph.name}")
            save_package(graph, request.sizes[2], made / f"{graph.name}.pt2")

    return request.export("aotinductor", ".pt2", write)


def to_tensorrt(
    model: nn.Module,
    folder: str | PathLike[str],
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | str | PathLike[str] | None = _DEFAULT,
    *,
    graphs: Form = "auto",
    experts: Experts = "padded",
    opset: int = OPSET,
    backend: Backend = "auto",
    compute_capabilities: Sequence[str] = (),
    workspace: int | None = None,
    steps: Progress | None = None,
    **options: Unpack[ExportOptions],
) -> Manifest:
    """Build TensorRT engines of a model with its caches; `load` runs them on an NVIDIA GPU.

    Args:
        model, example_inputs, example_kwargs, policy, graphs, opset: as for `to_onnx`; experts: padded or dense.
        folder: gets an engine for each graph and ``manifest.json``, all or none.
        backend: ``"tensorrt"``, ``"tensorrt-rtx"``, which builds without a GPU, or the first that is installed.
        compute_capabilities: such as ``"8.9"``, for TensorRT-RTX; none builds for the GPU that is there.
        workspace: most bytes of scratch memory.
        steps: told of TensorRT's progress: phase, steps done, steps in all; False cancels.
        options: see `ExportOptions`; with `check`, the ONNX form is run against PyTorch before the build.

    Returns:
        What was written.

    Raises:
        ExportError: as for `to_onnx`, or TensorRT refuses the graph, cannot build it, or was cancelled.
        ConfigError, MissingExtraError, MoecaError: as for `to_onnx`.
    """
    name, _ = find_backend(backend)
    target = Path(folder)
    _refuse_unrolled(experts, "TensorRT")
    prepare_folder(target)
    with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as temporary:
        source, made = Path(temporary, "onnx"), Path(temporary, "engine")
        to_onnx(
            model,
            source,
            example_inputs,
            example_kwargs,
            policy,
            graphs=graphs,
            experts=experts,
            opset=opset,
            **options,
        )
        made.mkdir()
        try:
            manifest = build_engines(
                source,
                made,
                backend=name,  # type: ignore[arg-type]  # a backend's own name
                compute_capabilities=compute_capabilities,
                workspace=workspace,
                steps=steps,
                progress=options.get("progress"),
            )
        except OSError as error:
            raise _unwritable(target, error) from error
        _put(made, target)
    return manifest


def build_engines(
    source: Path,
    made: Path,
    *,
    backend: Backend = "auto",
    compute_capabilities: Sequence[str] = (),
    workspace: int | None = None,
    steps: Progress | None = None,
    progress: Say | None = None,
) -> Manifest:
    """Build an engine for each graph of an ONNX artefact, and write their manifest.

    Args:
        source: folder of the ONNX artefact; made: of the engines, which exists.
        backend, compute_capabilities, workspace, steps: as for `to_tensorrt`; progress: see `ExportOptions`.

    Raises:
        ExportError, ConfigError, MissingExtraError: as for `to_tensorrt`.
        OSError: a file cannot be written.
    """
    name, module = find_backend(backend)
    manifest = read_manifest(source)
    engines = []
    for graph in manifest.graphs:
        if progress is not None:
            progress(f"building {graph['name']} with {name} {module.__version__}")
        engine = build_engine(
            source / graph["file"],
            graph,
            manifest.batch,
            backend=name,  # type: ignore[arg-type]  # a backend's own name
            compute_capabilities=compute_capabilities,
            workspace=workspace,
            progress=steps,
        )
        engines.append({**graph, "file": f"{graph['name']}.engine"})
        (made / engines[-1]["file"]).write_bytes(engine)
    manifest = replace(
        manifest,
        kind=name,
        graphs=engines,
        compute_capabilities=list(compute_capabilities),
        versions={**manifest.versions, name: module.__version__},
    )
    write_manifest(manifest, made)
    return manifest


@dataclass(frozen=True)
class _Request:
    """One export, checked before anything is traced."""

    model: nn.Module
    target: Path
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] | None
    method: Method | None
    form: Form
    experts: Experts
    sizes: tuple[int, int, int]
    options: ExportOptions
    say: Say

    def export(
        self, kind: str, ending: str, write: Callable[[ExportPlan, Path], None], opset: int | None = None
    ) -> Manifest:
        """Transform, write, check, and put everything in place.

        Args:
            kind: as in the manifest; ending: of its files.
            write: writes the graphs of a plan into a folder.
        """
        self.say("transforming")
        timestep = self.options.get("timestep")
        fast = transform(self.model, self.inputs, self.kwargs, self.method, timestep=timestep, compile=False)
        plan = build_plan(fast, self.form, self.experts)
        manifest = describe(plan, self.method, kind, ending, self.sizes, opset, self.options.get("sampler"))
        _check_space(self.target, plan)
        with tempfile.TemporaryDirectory(dir=self.target, prefix=".export-") as name:
            made = Path(name)
            try:
                write(plan, made)
            except OSError as error:
                raise _unwritable(self.target, error) from error
            write_manifest(manifest, made)
            gc.collect()  # traces hang together in cycles and are as large as the weights
            if self.options.get("check", True):
                self.say("running it against PyTorch")
                _refuse(verify(load(made), fast, plan, self.sizes))
            _put(made, self.target)
        return manifest


def _request(
    model: nn.Module,
    folder: str | PathLike[str],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    policy: Method | str | PathLike[str] | None,
    form: Form,
    options: ExportOptions,
    experts: Experts = "padded",
) -> _Request:
    method = None if policy is None else as_method(policy)
    if method is not None and not isinstance(method, Method):
        raise ConfigError("export: expected a method, its name or its file, which a manifest can hold, found a Policy")
    if experts not in get_args(Experts):
        raise ConfigError(f"experts: expected one of {', '.join(get_args(Experts))}, found {experts!r}")
    if method is not None and form == "one":
        exportable_rule(method.policy())
    sizes, target = _batch(options.get("batch", (1, 8, 32))), Path(folder)
    dtype = options.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    prepare_folder(target)
    if dtype is not None:
        model = copy.deepcopy(model).to(DTYPES[dtype])
        inputs, kwargs = pytree.tree_map_only(Tensor, partial(_cast, dtype=DTYPES[dtype]), (inputs, dict(kwargs or {})))
    return _Request(model, target, inputs, kwargs, method, form, experts, sizes, options, _sayer(options))


def _refuse_unrolled(experts: Experts, what: str) -> None:
    if experts == "unrolled":
        raise ConfigError(f"experts: 'unrolled' is a form of ONNX alone; {what} takes padded or dense")


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value


def _sayer(options: ExportOptions) -> Say:
    return options.get("progress") or (lambda stage: None)


def _check_space(target: Path, plan: ExportPlan) -> None:
    """Raise before long work where the weights will not fit; torch ends the process when a disk fills under it."""
    weights = sum(tensor.nbytes for tensor in plan.program.traced.model.state_dict().values())
    free = shutil.disk_usage(target).free
    if free < weights + _ROOM:
        raise MoecaError(
            f"cannot write into {target}: {readable_bytes(free)} are free, at least {readable_bytes(weights + _ROOM)} "
            "are needed; make room, or choose another folder"
        )


def _unwritable(target: Path, error: OSError) -> MoecaError:
    return MoecaError(f"cannot write into {target}: {error.strerror or error}; choose another folder")


def _put(made: Path, target: Path) -> None:
    """Move the files into place, the manifest last."""
    for file in sorted(made.iterdir(), key=lambda file: file.suffix == ".json"):
        file.replace(target / file.name)


def _batch(batch: int | Sequence[int]) -> tuple[int, int, int]:
    given = (batch, batch, batch) if isinstance(batch, int) else tuple(batch)
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in given)
    if len(given) != 3 or not whole or not 1 <= given[0] <= given[1] <= given[2]:
        raise ConfigError(f"batch: expected one size or least, best and most, ascending from 1, found {batch!r}")
    return given[0], given[1], given[2]


def _refuse(found: Verification) -> None:
    if not found.passed:
        raise ExportError(
            f"export: the artefact differs from PyTorch: {found}; nothing was written; please report this"
        )
