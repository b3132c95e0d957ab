"""accelerate's hook for whole models, imitated where there is no second device: moves give weights new memory."""

import functools
from typing import Any

import torch
from torch import Tensor, nn


def moved(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


class CpuOffload:
    """`accelerate.hooks.CpuOffload`; `moves` counts those to the device."""

    no_grad = False

    def __init__(self) -> None:
        self.there, self.moves = False, 0

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.there = False
        return module._apply(moved)  # type: ignore[no-any-return]  # untyped in torch

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.there:
            self.there, self.moves = True, self.moves + 1
            module._apply(moved)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


CpuOffload.__module__ = "accelerate.hooks"


def add_hook(module: Any, hook: CpuOffload) -> CpuOffload:
    """As `accelerate.hooks.add_hook_to_module`."""

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        return module._hf_hook.post_forward(module, module._old_forward(*args, **kwargs))

    module._old_forward = module.forward
    hook.init_hook(module)
    module._hf_hook = hook
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)
    return hook


def remove_hook(module: Any) -> None:
    """As `accelerate.hooks.remove_hook_from_module`."""
    del module._hf_hook
    module.forward = module._old_forward
    del module._old_forward


def storages(*modules: nn.Module) -> set[int]:
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return {torch.UntypedStorage.data_ptr(tensor.untyped_storage()) for tensor in tensors}
