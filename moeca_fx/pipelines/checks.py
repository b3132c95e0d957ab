"""Refuse pipelines that cannot be served: what to do instead is in every message."""

from typing import Any

from torch import nn

from moeca_fx.errors import ConfigError, UnsupportedModelError, require
from moeca_fx.model_checks import check_model
from moeca_fx.offloading import whole_model_hook, without_hook
from moeca_fx.pipelines.schedulers import is_scheduler

_BY_CONVENTION = ("transformer", "unet")


def check_pipeline(pipe: object) -> None:
    """Raise `ConfigError` unless it is a diffusers pipeline.

    Raises:
        MissingExtraError: diffusers is not installed.
    """
    require("diffusers", "pipelines")
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise ConfigError(
            f"expected a diffusers pipeline (DiffusionPipeline), found {type(pipe).__name__}; a model alone is made "
            "faster with moeca_fx.transform"
        )


def check_scheduler(pipe: Any) -> None:
    """Raise `ConfigError` unless something in the pipeline is stepped: that tells where a denoising step ends."""
    if not any(is_scheduler(value) for value in vars(pipe).values()):
        raise ConfigError(
            f"{type(pipe).__name__}: has no scheduler, whose step() tells where a denoising step ends; expected one "
            "among its attributes: set it, or transform the denoiser with moeca_fx.transform"
        )


def find_denoiser(pipe: Any, named: str | None) -> str:
    """Name of the component to swap: `named`, or where diffusers keeps it by convention.

    Raises:
        ConfigError: there is none, or it is no module.
    """
    modules = [name for name, value in pipe.components.items() if isinstance(value, nn.Module)]
    chosen = named if named is not None else next((name for name in _BY_CONVENTION if name in modules), None)
    if chosen is not None and chosen in modules:
        return chosen
    wanted = f"a module named {named!r}" if named is not None else f"one named {' or '.join(_BY_CONVENTION)}"
    raise ConfigError(
        f"{type(pipe).__name__}: expected {wanted} among its components, found {', '.join(modules) or 'no module'}; "
        "pass denoiser='<name of the component that predicts the noise>'"
    )


def check_denoiser(pipe: Any, name: str, model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a denoiser that is hooked, offloaded, compiled or in another wrong state.

    Cheap: this runs before every request, because pipelines add hooks at any time.
    """
    where = f"{type(pipe).__name__}.{name}"
    offloaded = [path or name for path, module in model.named_modules() if "_hf_hook" in vars(module)]
    if offloaded and whole_model_hook(model) is None:
        raise UnsupportedModelError(
            f"{where}: accelerate moves its weights layer by layer while it runs ({offloaded[-1]} has a hook, from "
            "sequential offloading or a device_map), which a compiled graph would not see; call "
            "pipe.remove_all_hooks() or pipe.reset_device_map(), then pipe.enable_model_cpu_offload(), which moves "
            "whole models, or pipe.to(device)"
        )
    hooked = [path or name for path, module in model.named_modules() if _has_diffusers_hooks(module)]
    if hooked:
        raise UnsupportedModelError(
            f"{where}: diffusers' own hooks are on {hooked[0]} (group offloading, layerwise casting, another cache), "
            "which a compiled graph would not run; disable them: one cache at a time, whole weights on one device"
        )
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedModelError(
            f"{where}: was compiled in place; moeca_fx compiles its graphs itself (apply(..., compile=True)): load the "
            "pipeline without compiling its denoiser"
        )
    with without_hook(model):
        check_model(model)


def _has_diffusers_hooks(module: nn.Module) -> bool:
    """Whether a registry of hooks is there and holds one; pipelines that name their calls leave empty ones."""
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and bool(registry.hooks)
