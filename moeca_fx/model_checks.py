"""Refuse models in a state that cannot be transformed, and example inputs that do not fit, before any tracing."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.errors import InputError, UnsupportedModelError
from moeca_fx.policies import Method, Policy, as_method

_SHOWN = 3


def check_model(model: nn.Module) -> None:
    """Raise `UnsupportedModelError`, naming the modules: transformed already, training, hooked or quantised."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, found {name}; pass the denoiser, not the pipeline")
    if "_moeca" in vars(model):
        raise UnsupportedModelError(f"{name}: is transformed already; pass the original model, with any policy")
    check_autocast()
    patched = [path or name for path, module in model.named_modules() if "forward" in vars(module)]
    if patched:
        raise UnsupportedModelError(
            f"{_list(patched)}: forward was replaced on the instance, which hides what the model computes; undo that "
            "(the tool that did it: offloading, compilation, a patch) and transform again"
        )
    training = [path or name for path, module in model.named_modules() if module.training]
    if training:
        raise UnsupportedModelError(
            f"{_list(training)}: in training mode; caching is for inference: call model.eval() first"
        )
    hooked = [path or name for path, module in model.named_modules() if _has_hooks(module)]
    if hooked:
        raise UnsupportedModelError(
            f"{_list(hooked)}: has forward or backward hooks, which a compiled graph would not run; remove them (or "
            "the tool that added them: offloading, profiling, adapters) and transform again"
        )
    quantised = [path for path, module in model.named_modules() if _is_quantised(module)]
    if quantised:
        raise UnsupportedModelError(
            f"{_list(quantised)}: quantised weights; expected floating-point parameters: "
            "transform the unquantised model"
        )


def has_no_data(model: nn.Module) -> bool:
    """Whether the model is on the meta device: shapes without values, which nothing can be proven on."""
    return any(parameter.is_meta for parameter in model.parameters())


def check_autocast() -> None:
    """Raise `UnsupportedModelError` inside an autocast block: the graphs are traced and proven in the model's dtype."""
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise UnsupportedModelError(
            "autocast is on: a transformed model runs in the dtype of its weights; leave the autocast block and cast "
            "the model instead, e.g. model.bfloat16()"
        )


def resolve_policy(policy: object) -> Policy:
    """The parts of what was given as a policy.

    Raises:
        ConfigError: it is no method, policy, method's name or policy file.
    """
    chosen = as_method(policy)
    return chosen.policy() if isinstance(chosen, Method) else chosen


def check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise `InputError` when the example inputs do not fit forward's signature or are not finite."""
    if not isinstance(args, tuple):
        raise InputError(f"example_inputs: expected a tuple, found {type(args).__name__}; pass (x, t, ...)")
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"example inputs do not fit {type(model).__name__}.forward{signature}: {error}; pass what one call takes"
        ) from error
    for index, leaf in enumerate(pytree.tree_leaves((args, dict(kwargs)))):
        if isinstance(leaf, Tensor) and count_not_finite(leaf):
            raise InputError(f"example input {index}: expected finite values, found NaN or infinity; pass a real input")
        if isinstance(leaf, Tensor) and leaf.is_meta != has_no_data(model):
            raise InputError(
                f"example input {index}: expected a tensor where the model's weights are, found one on {leaf.device}; "
                "a model on the meta device takes inputs on it, any other real ones"
            )


def count_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or +infinity; -infinity is what additive masks hold."""
    if not tensor.is_floating_point() or tensor.is_meta or math.isfinite(tensor.sum(dtype=torch.float32)):
        return 0  # one odd value makes the sum odd, which takes one operation to see
    return int((~(torch.isfinite(tensor) | torch.isneginf(tensor))).sum())


def run_once(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the model on the example inputs; what it raises becomes one `InputError`."""
    try:
        return model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot run on the example inputs: {type(error).__name__}: {error}; pass inputs of "
            "the shapes and dtypes that one sampling step uses"
        ) from error


def _has_hooks(module: nn.Module) -> bool:
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or backward)


def _is_quantised(module: nn.Module) -> bool:
    if ".quantized" in type(module).__module__:
        return True
    if any(b.dtype in (torch.int8, torch.uint8) and b.dim() >= 2 for b in module.buffers(recurse=False)):
        return True  # weight-only quantisation keeps its integers in buffers
    tensors = [*module.parameters(recurse=False)]
    return any(not tensor.is_floating_point() or type(tensor.data) is not Tensor for tensor in tensors)


def _list(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more modules" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more
