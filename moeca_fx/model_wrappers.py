"""Which package wrapped a model, and how its user takes that off again, for the messages that refuse it.

    partial(new_forward, ...) defined in accelerate.hooks     "accelerate"     remove_hook_from_module(...)

Packages are told by where a function was defined; nothing of the model is looked at.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

_THEN = "transform, and move the model with .to(device) then; what does not fit there whole cannot be cached"
_UNDO = {
    "accelerate": "take offloading off with accelerate.hooks.remove_hook_from_module(model, recurse=True), from a "
    f"pipeline with pipe.remove_all_hooks(), {_THEN}",
    "diffusers": "take off what diffusers put there (group offloading, layerwise casting, caching), for a pipeline "
    f"with pipe.remove_all_hooks(), else by loading the model without, {_THEN}",
    "peft": "merge the adapters with merge_and_unload(), of a pipeline with pipe.fuse_lora(), and transform again",
}


def package_of(function: Any) -> str | None:
    """The package that a hook or a replaced forward was defined in; None where it does not say."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    module = getattr(function, "__module__", None) or type(function).__module__
    root = str(module).partition(".")[0]
    return None if root in ("builtins", "functools", "__main__") else root


def how_to_undo(functions: Iterable[Any], otherwise: str) -> str:
    """What to do about these functions; `otherwise` where their packages are not known."""
    advice = dict.fromkeys(_UNDO[package] for f in functions if (package := package_of(f)) in _UNDO)
    return "; ".join(advice) or otherwise


def is_own_forward(module: nn.Module) -> bool:
    """Whether the instance holds its class's own forward, which tools leave there that put the original back."""
    forward = vars(module).get("forward")
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
