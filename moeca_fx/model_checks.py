"""Refuse models in a state that cannot be transformed, and example inputs that do not fit, before any tracing."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.errors import InputError, UnsupportedModelError
from moeca_fx.model_wrappers import how_to_undo, is_own_forward, package_of
from moeca_fx.policies import Method, Policy, as_method
from moeca_fx.reasons import Reason

_SHOWN = 3


def check_model(model: nn.Module) -> None:
    """Raise `UnsupportedModelError`, naming the modules: transformed already, training, hooked or quantised."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a torch.nn.Module, found {name}; pass the denoiser, not the pipeline", code=Reason.NOT_A_MODULE
        )
    if "_moeca" in vars(model):
        raise UnsupportedModelError(
            f"{name}: is transformed already; pass the original model, with any policy", code=Reason.TRANSFORMED
        )
    frozen = [path or name for path, module in model.named_modules() if _made_for_inference(module)]
    if frozen:
        raise UnsupportedModelError(
            f"{_list(frozen)}: made inside torch.inference_mode, so that writes to it cannot be seen; load the model "
            "outside of the block (calls inside are welcome)",
            code=Reason.MADE_FOR_INFERENCE,
        )
    patched = {
        path or name: vars(module)["forward"]
        for path, module in model.named_modules()
        if "forward" in vars(module) and not is_own_forward(module)
    }
    if patched:
        undo = "undo that (the tool that did it: offloading, compilation, a patch) and transform again"
        raise UnsupportedModelError(
            f"{_list(list(patched))}: forward was replaced on the instance{_by(patched.values())}, which hides what "
            f"the model computes; {how_to_undo(patched.values(), undo)}",
            code=Reason.PATCHED,
        )
    training = [path or name for path, module in model.named_modules() if module.training]
    if training:
        raise UnsupportedModelError(
            f"{_list(training)}: in training mode; caching is for inference: call model.eval() first",
            code=Reason.TRAINING,
        )
    hooked = {path or name: hooks for path, module in model.named_modules() if (hooks := _hooks(module))}
    if hooked:
        undo = "remove them (or the tool that added them: offloading, profiling, adapters) and transform again"
        functions = [hook for hooks in hooked.values() for hook in hooks]
        raise UnsupportedModelError(
            f"{_list(list(hooked))}: has forward or backward hooks{_by(functions)}, which a compiled graph would not "
            f"run; {how_to_undo(functions, undo)}",
            code=Reason.HOOKED,
        )
    quantised = [path for path, module in model.named_modules() if _is_quantised(module)]
    if quantised:
        raise UnsupportedModelError(
            f"{_list(quantised)}: quantised weights; expected floating-point parameters: "
            "transform the unquantised model",
            code=Reason.QUANTISED,
        )


def has_no_data(model: nn.Module) -> bool:
    """Whether the model is on the meta device: shapes without values, which nothing can be proven on."""
    return any(parameter.is_meta for parameter in model.parameters())


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
        raise InputError(
            f"example_inputs: expected a tuple, found {type(args).__name__}; pass (x, t, ...)", code=Reason.INPUTS
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"example inputs do not fit {type(model).__name__}.forward{signature}: {error}; pass what one call takes",
            code=Reason.INPUTS,
        ) from error
    for index, leaf in enumerate(pytree.tree_leaves((args, dict(kwargs)))):
        if isinstance(leaf, Tensor) and count_not_finite(leaf):
            raise InputError(
                f"example input {index}: expected finite values, found NaN or infinity; pass a real input",
                code=Reason.INPUTS,
            )
        if isinstance(leaf, Tensor) and leaf.is_meta != has_no_data(model):
            raise InputError(
                f"example input {index}: expected a tensor where the model's weights are, found one on {leaf.device}; "
                "a model on the meta device takes inputs on it, any other real ones",
                code=Reason.INPUTS,
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
            "the shapes and dtypes that one sampling step uses",
            code=Reason.INPUTS,
        ) from error


def _made_for_inference(module: nn.Module) -> bool:
    return any(t.is_inference() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _hooks(module: nn.Module) -> list[Any]:
    groups = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for group in groups for hook in group.values()]


def _is_quantised(module: nn.Module) -> bool:
    if ".quantized" in type(module).__module__:
        return True
    if any(b.dtype in (torch.int8, torch.uint8) and b.dim() >= 2 for b in module.buffers(recurse=False)):
        return True  # weight-only quantisation keeps its integers in buffers
    tensors = [*module.parameters(recurse=False)]
    return any(not tensor.is_floating_point() or type(tensor.data) is not Tensor for tensor in tensors)


def _by(functions: Iterable[Any]) -> str:
    packages = dict.fromkeys(package for function in functions if (package := package_of(function)))
    return f" by {', '.join(packages)}" if packages else ""


def _list(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more modules" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more
