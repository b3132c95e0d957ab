"""One export, whatever its format: checked, transformed, written into a folder of its own, proven, put in place."""

import copy
import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.autocast import OFF, Autocast
from moeca_fx.errors import ConfigError, ExportError, MoecaError
from moeca_fx.export.manifest import GraphFacts, Manifest, describe, write_manifest
from moeca_fx.export.plan import ExportPlan, Form, build_plan, exportable_rule
from moeca_fx.export.runner import load
from moeca_fx.export.verify import Verification, verify
from moeca_fx.files import prepare_folder
from moeca_fx.passes.lower_export import Experts
from moeca_fx.policies import Method
from moeca_fx.policies.registry import as_method
from moeca_fx.sizes import readable_bytes
from moeca_fx.transform import transform

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ROOM = 2**20  # bytes of graphs and manifest
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


@dataclass(frozen=True)
class Request:
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
        self,
        kind: str,
        ending: str,
        write: Callable[[ExportPlan, Path], Mapping[str, GraphFacts] | None],
        opset: int | None = None,
    ) -> Manifest:
        """Transform, write, check, and put everything in place.

        Args:
            kind: as in the manifest; ending: of its files.
            write: writes the graphs of a plan into a folder; may say what became of each.
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
                facts = write(plan, made) or {}
            except OSError as error:
                raise unwritable(self.target, error) from error
            manifest = manifest.with_facts(facts)
            write_manifest(manifest, made)
            gc.collect()  # traces hang together in cycles and are as large as the weights
            if self.options.get("check", True):
                self.say("running it against PyTorch")
                _refuse(verify(load(made), fast, plan, self.sizes))
            put(made, self.target)
        return manifest


def make_request(
    model: nn.Module,
    folder: str | PathLike[str],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    policy: Method | str | PathLike[str] | None,
    form: Form,
    options: ExportOptions,
    experts: Experts = "padded",
) -> Request:
    """Check what can be checked before anything is traced.

    Raises:
        ConfigError: an option is out of range.
        ExportError: the policy has no such form.
        MoecaError: the folder cannot be written.
    """
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
    if Autocast.now() != OFF:
        raise ExportError(
            f"export: autocast is on ({Autocast.now()}), and an artefact computes in the dtype of its weights; leave "
            "the block and export the model in that dtype, e.g. dtype='fp16'"
        )
    prepare_folder(target)
    if dtype is not None:
        model = copy.deepcopy(model).to(DTYPES[dtype])
        inputs, kwargs = pytree.tree_map_only(Tensor, partial(_cast, dtype=DTYPES[dtype]), (inputs, dict(kwargs or {})))
    return Request(model, target, inputs, kwargs, method, form, experts, sizes, options, sayer(options))


def refuse_compiled(form: Form, what: str) -> None:
    """Raise `ConfigError` for the form that only AOTInductor takes."""
    if form == "compiled":
        raise ConfigError(f"graphs: 'compiled' is AOTInductor's form; {what} takes auto, one or steps")


def refuse_unrolled(experts: Experts, what: str) -> None:
    """Raise `ConfigError` for what only ONNX can hold."""
    if experts == "unrolled":
        raise ConfigError(f"experts: 'unrolled' is a form of ONNX alone; {what} takes padded or dense")


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value


def sayer(options: ExportOptions) -> Say:
    """Whom to tell of stages."""
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


def unwritable(target: Path, error: OSError) -> MoecaError:
    """What is said of a file that could not be written."""
    return MoecaError(f"cannot write into {target}: {error.strerror or error}; choose another folder")


def put(made: Path, target: Path) -> None:
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
