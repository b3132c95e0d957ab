"""`to_onnx` and `to_tensorrt`: transform a model for export, prove the artefact, write it and its manifest."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from moeca_fx.errors import ConfigError, ExportError, MoecaError
from moeca_fx.export.engine import Backend, Progress, build_engine, find_backend
from moeca_fx.export.manifest import Manifest, describe, write_manifest
from moeca_fx.export.onnx_file import OPSET, make_onnx, save_onnx
from moeca_fx.export.runner import load
from moeca_fx.export.step import build_step, exportable_rule
from moeca_fx.export.verify import Verification, verify
from moeca_fx.files import prepare_folder, write_whole
from moeca_fx.policies import Method, MoECa
from moeca_fx.policies.registry import as_method
from moeca_fx.transform import transform

ONNX_FILE = "model.onnx"
ENGINE_FILE = "model.engine"
_DEFAULT = MoECa()


def to_onnx(
    model: nn.Module,
    folder: str | PathLike[str],
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | str | PathLike[str] | None = _DEFAULT,
    *,
    batch: int | Sequence[int] = (1, 8, 32),
    timestep: str | int | None = None,
    opset: int = OPSET,
    external_data: bool = True,
    check: bool = True,
    sampler: dict[str, Any] | None = None,
    progress: Callable[[str], object] | None = None,
) -> Manifest:
    """Export a model with its caches as named inputs and outputs.

    Args:
        model: as for `moeca_fx.transform`.
        folder: gets ``model.onnx``, its weights and ``manifest.json``, all of them or none.
        example_inputs, example_kwargs: inputs of one forward call.
        policy: a method of one branch rule that holds its features (MoECa), by name or from a file too; None exports
            the model without caches.
        batch: least, best and most samples of a call, or one number for all three.
        timestep: as for `moeca_fx.transform`.
        opset: version of ONNX's operators.
        external_data: weights in a file beside the graph, which those over 2 GB need.
        check: run the artefact against PyTorch over a few steps before it is done.
        sampler: what the manifest shall say of the model's sampler; `moeca-fx run` reads it.
        progress: called with a word or two before each stage.

    Returns:
        What was written.

    Raises:
        ExportError: the policy or model has no form for export, or the artefact does not compute the same.
        ConfigError: `batch` or `policy` is out of range.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        MoecaError: what `transform` raises, or the folder cannot be written.
    """
    say = progress or (lambda stage: None)
    method = None if policy is None else as_method(policy)
    if method is not None and not isinstance(method, Method):
        raise ConfigError("export: expected a method, its name or its file, which a manifest can hold, found a Policy")
    if method is not None:
        exportable_rule(method.policy())
    sizes = _batch(batch)
    target = Path(folder)
    prepare_folder(target)
    say("transforming")
    fast = transform(model, example_inputs, example_kwargs, method, timestep=timestep, compile=False)
    step = build_step(fast)
    say("tracing and translating to ONNX")
    made = make_onnx(step, sizes[2], opset)
    with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as name:
        temporary = Path(name)
        say("writing")
        try:
            save_onnx(made, temporary / ONNX_FILE, external_data)
        except OSError as error:
            raise MoecaError(f"cannot write into {target}: {error.strerror or error}; choose another folder") from error
        manifest = describe(step, method, "onnx", ONNX_FILE, sizes, opset, sampler)
        write_manifest(manifest, temporary)
        if check:
            say("running it against PyTorch")
            _refuse(verify(load(temporary), fast, step, sizes))
        _put(temporary, target)
    return manifest


def to_tensorrt(
    model: nn.Module,
    folder: str | PathLike[str],
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | str | PathLike[str] | None = _DEFAULT,
    *,
    backend: Backend = "auto",
    compute_capabilities: Sequence[str] = (),
    workspace: int | None = None,
    steps: Progress | None = None,
    progress: Callable[[str], object] | None = None,
    **options: Any,
) -> Manifest:
    """Build a TensorRT engine of a model with its caches; nothing runs it here.

    Args:
        model, example_inputs, example_kwargs, policy: as for `to_onnx`.
        folder: gets ``model.engine`` and ``manifest.json``, both or none.
        backend: ``"tensorrt"``, ``"tensorrt-rtx"``, which builds without a GPU, or the first that is installed.
        compute_capabilities: such as ``"8.9"``, for TensorRT-RTX; none builds for the GPU that is there.
        workspace: most bytes of scratch memory.
        steps: told of TensorRT's progress: phase, steps done, steps in all; False cancels.
        progress: called with a word or two before each stage.
        options: further ones of `to_onnx`; with `check`, the ONNX form is run against PyTorch before the build.

    Returns:
        What was written.

    Raises:
        ExportError: as for `to_onnx`, or TensorRT refuses the graph, cannot build it, or was cancelled.
        ConfigError, MissingExtraError, MoecaError: as for `to_onnx`.
    """
    name, module = find_backend(backend)
    target = Path(folder)
    prepare_folder(target)
    with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as temporary:
        work = Path(temporary)
        source = to_onnx(model, work / "onnx", example_inputs, example_kwargs, policy, progress=progress, **options)
        if progress is not None:
            progress(f"building with {name} {module.__version__}")
        engine = build_engine(
            work / "onnx" / source.file,
            source,
            backend=name,  # type: ignore[arg-type]  # a backend's own name
            compute_capabilities=compute_capabilities,
            workspace=workspace,
            progress=steps,
        )
        made = work / "engine"
        write_whole(made / ENGINE_FILE, lambda path: path.write_bytes(engine))
        manifest = replace(
            source,
            kind=name,
            file=ENGINE_FILE,
            compute_capabilities=list(compute_capabilities),
            versions={**source.versions, name: module.__version__},
        )
        write_manifest(manifest, made)
        _put(made, target)
    return manifest


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
