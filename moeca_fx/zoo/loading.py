"""Load published weights: from a local file or the hub, checked whole before anything is copied."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.errors import WeightsError, require

WRAPPERS = ("ema", "model", "state_dict")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
HUB_DEFAULT_FILE = "model.safetensors"
SHOWN = 3


def load_weights(model: nn.Module, source: str | os.PathLike[str], strict: bool = True) -> None:
    """Copy a state dict into `model`, in place; when anything is wrong the model stays as it was.

    Args:
        model: receives the weights in its own dtype and device.
        source: a local ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, or a hub id ``org/name`` or
            ``org/name:filename`` (default file ``model.safetensors``). Torch files are read with
            ``weights_only=True`` and may wrap the state dict under "ema" (preferred, as published samplers
            do), "model" or "state_dict".
        strict: also refuse missing and unexpected keys; shapes must always fit.

    Raises:
        WeightsError: missing or unreadable file, or one that does not fit the model.
        MissingExtraError: safetensors or huggingface_hub is needed and not installed.
    """
    path = _locate(os.fspath(source))
    state = _read(path)
    _check(model, state, path, strict)
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name in own:
                own[name].copy_(value)


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        raise WeightsError(f"weights {source!r} is a folder; name the file inside it")
    if path.exists():
        return path
    repo, _, filename = source.partition(":")
    looks_local = path.is_absolute() or source.startswith((".", "~")) or repo.count("/") != 1
    if looks_local or (not filename and path.suffix in (".safetensors", *TORCH_SUFFIXES)):
        raise WeightsError(
            f"no weights file at {source!r}; give an existing .safetensors/.pt/.pth/.bin file or a hub id "
            "'org/name:filename'"
        )
    return _download(repo, filename or HUB_DEFAULT_FILE)


def _download(repo: str, filename: str) -> Path:
    require("huggingface_hub", "hub")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id=repo, filename=filename))
    except Exception as error:  # the client has many: offline, no such repository or file, no access
        raise WeightsError(
            f"could not fetch {filename!r} from hub repository {repo!r} ({type(error).__name__}: {error}); "
            "check the name and the connection, or download the file and pass its path"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        require("safetensors.torch", "zoo")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path} is no readable safetensors file ({error}); fetch it again") from error
    if path.suffix not in TORCH_SUFFIXES:
        raise WeightsError(f"{path}: unknown weights format {path.suffix!r}; expected .safetensors, .pt, .pth or .bin")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt archives and refused pickles surface as many unrelated types
        first_line = str(error).strip().split("\n")[0]
        raise WeightsError(
            f"{path} is no readable torch weights file ({type(error).__name__}: {first_line}); fetch it "
            "again, and note that files with arbitrary Python objects are refused"
        ) from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            f"{path} holds no state dict: expected names mapped to tensors, bare or under one of {WRAPPERS}, "
            f"found {_describe(content)}"
        )
    return {str(name): value for name, value in content.items()}


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with keys {_first([str(key) for key in content])}"
    return type(content).__name__


def _check(model: nn.Module, state: Mapping[str, Tensor], path: Path, strict: bool) -> None:
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misfit = [
        f"{name} (model {list(own[name].shape)}, file {list(value.shape)})"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    problems = []
    if misfit:
        problems.append(f"{len(misfit)} wrong shapes: {_first(misfit)}")
    if strict and missing:
        problems.append(f"{len(missing)} missing keys: {_first(missing)}")
    if strict and unexpected:
        problems.append(f"{len(unexpected)} unexpected keys: {_first(unexpected)}")
    if not strict and len(missing) == len(own):
        problems.append(f"none of the model's {len(own)} keys is in the file, which has {_first(list(state))}")
    if problems:
        raise WeightsError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. Build the "
            "model in the size the file was saved with, or convert the names"
        )


def _first(items: list[str]) -> str:
    more = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
