"""accelerate's hook that moves a whole model before its forward (`pipe.enable_model_cpu_offload()`).

    model.forward       partial(new_forward, model)       moves the model to its device, then calls _old_forward
    model._old_forward  the model's own forward
    model._hf_hook      CpuOffload(device)

Such a model is whole whenever it runs, so it can be transformed; hooks inside of it move weights layer by layer, which
no graph sees. A hook is told by its class, accelerate is not imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

_PLACES = ("forward", "_old_forward", "_hf_hook")


def whole_model_hook(model: nn.Module) -> Any | None:
    """The hook that moves `model` as a whole; None where there is none, or others besides."""
    hook = vars(model).get("_hf_hook")
    kind = type(hook)
    if kind.__name__ != "CpuOffload" or kind.__module__.partition(".")[0] != "accelerate":
        return None  # before the modules are looked through: denoisers ask at every call
    inside = any("_hf_hook" in vars(module) for module in model.modules() if module is not model)
    return None if inside else hook


@contextmanager
def without_hook(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` has its class's forward, for what looks at it or copies it."""
    hidden = _PLACES if whole_model_hook(model) is not None else ("forward",) if _is_stand_ins(model) else ()
    taken = {name: vars(model).pop(name) for name in hidden if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(taken)


def _is_stand_ins(model: nn.Module) -> bool:
    """Whether forward on the instance is another object's that shares its attributes: a hook was taken off that."""
    owner = getattr(vars(model).get("forward"), "__self__", model)
    return owner is not model and getattr(owner, "__dict__", None) is vars(model)


def give_back(model: nn.Module) -> None:
    """Bind to `model` what was bound to an object that shares its attributes and is no longer used."""
    if _is_stand_ins(model):
        del vars(model)["forward"]
    if whole_model_hook(model) is not None:
        forward, own = vars(model)["forward"], MethodType(type(model).forward, model)
        vars(model)["_old_forward"] = own
        if isinstance(forward, partial):
            vars(model)["forward"] = partial(forward.func, model, *forward.args[1:], **forward.keywords)
