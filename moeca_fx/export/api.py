"""`to_onnx`, `to_tensorrt`, `to_pt2`, `to_aotinductor`: transform, write graphs and manifest, prove them."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from torch import nn

from moeca_fx.errors import ConfigError, ExportError
from moeca_fx.export.engine import Backend, Progress, build_engine, find_backend
from moeca_fx.export.manifest import GraphFacts, Manifest, read_manifest, write_manifest
from moeca_fx.export.onnx.file import OPSET, lists_of, make_onnx, save_onnx
from moeca_fx.export.onnx.in_place import caches_in_place
from moeca_fx.export.onnx.whole import Lengths
from moeca_fx.export.package import save_package
from moeca_fx.export.plan import ExportPlan, Form
from moeca_fx.export.request import ExportOptions, Say, make_request, put, refuse_compiled, refuse_unrolled, unwritable
from moeca_fx.export.sessions.onnx import NO_BF16
from moeca_fx.export.trace import trace
from moeca_fx.files import prepare_folder
from moeca_fx.passes.lower_export import Experts
from moeca_fx.policies import Method, MoECa

_DEFAULT = MoECa()
_UNROLLED: Experts = "unrolled"


def to_onnx(
    model: nn.Module,
    folder: str | PathLike[str],
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | str | PathLike[str] | None = _DEFAULT,
    *,
    graphs: Form = "auto",
    experts: Experts | Literal["auto"] = "auto",
    lengths: Lengths | Literal["auto"] = "auto",
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
        lengths: of lists that depend on data: ``"nonzero"``, which ``"auto"`` is: exact, and onnxruntime's
            CPU provider writes caches in place; ``"range"``: two entries at least, without `NonZero`, as TensorRT asks;
            ``"input"``: the caller gives them and runs a step again where they were too short, as `load` does; experts
            are padded or dense then.
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
    refuse_compiled(graphs, "ONNX")
    if lengths not in ("auto", *get_args(Lengths)):
        raise ConfigError(f"lengths: expected auto, {', '.join(get_args(Lengths))}, found {lengths!r}")
    made_as: Lengths = "nonzero" if lengths == "auto" else lengths
    given = made_as == "input"
    if given and experts == _UNROLLED:
        raise ConfigError(
            "lengths: 'input' gives one length for the groups of all experts, and experts='unrolled' has one for each; "
            "take padded or dense experts, or lengths='nonzero'"
        )
    request = make_request(
        model,
        folder,
        example_inputs,
        example_kwargs,
        policy,
        graphs,
        options,
        experts if experts != "auto" else "padded" if given else _UNROLLED,
    )
    if options.get("check", True) and next(request.model.parameters()).dtype is torch.bfloat16:
        raise ExportError(f"export to ONNX: {NO_BF16}")

    def write(plan: ExportPlan, made: Path) -> dict[str, GraphFacts]:
        request.say("tracing and translating to ONNX")
        models = {
            graph.name: make_onnx(graph, request.sizes[2], opset, plan.program.sites, made_as) for graph in plan.graphs
        }
        request.say("writing")
        save_onnx(models, made, external_data)
        # A step that may have to run again must find its caches as they were.
        return {
            name: GraphFacts((), lists_of(graph)) if given else GraphFacts(caches_in_place(graph))
            for name, graph in models.items()
        }

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
    refuse_compiled(graphs, ".pt2")
    refuse_unrolled(experts, ".pt2")
    request = make_request(model, folder, example_inputs, example_kwargs, policy, graphs, options, experts)

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
    request = make_request(model, folder, example_inputs, example_kwargs, policy, "compiled", options)

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
    lengths: Lengths = "range",
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
        lengths: ``"range"``, or ``"input"``, which has TensorRT wait for the GPU once a step instead of once a list.
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
    refuse_unrolled(experts, "TensorRT")
    if lengths not in ("range", "input"):
        raise ConfigError(f"lengths: TensorRT takes range or input, found {lengths!r}: it has no NonZero")
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
            lengths=lengths,
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
            raise unwritable(target, error) from error
        put(made, target)
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
