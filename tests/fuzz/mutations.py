"""Ways to mutilate a model of `tests.structures` and its inputs: what users bring by mistake, or by intent."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Given = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Mutation = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Given]


def _experts(model: nn.Module) -> list[nn.Module]:
    """Modules of the last list of several; empty where experts are held otherwise."""
    lists = [list(m.children()) for m in model.blocks[-1].modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]  # type: ignore[union-attr,index]
    return lists[-1] if lists else []


def _cast(dtype: torch.dtype, inputs_too: bool) -> Mutation:
    def mutate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        model = model.to(dtype)
        return (model, *_mapped(args, kwargs, lambda t: t.to(dtype))) if inputs_too else (model, args, kwargs)

    return mutate


def _mapped(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Any], least_dims: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with their floating-point tensors changed."""

    def one(leaf: Any) -> Any:
        fits = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= least_dims
        return change(leaf) if fits else leaf

    return pytree.tree_map(one, args), pytree.tree_map(one, kwargs)


def _inputs(change: Callable[[Tensor], Any], least_dims: int = 0) -> Mutation:
    return lambda model, args, kwargs: (model, *_mapped(args, kwargs, change, least_dims))


def _weights(change: Callable[[str, nn.Parameter], None]) -> Mutation:
    """A change of every parameter of the last layer."""

    def mutate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        for name, parameter in model.blocks[-1].ffn.named_parameters():  # type: ignore[union-attr,index]
            with torch.no_grad():
                change(name, parameter)
        return model, args, kwargs

    return mutate


def _poisoned(value: float) -> Mutation:
    def poison(_name: str, parameter: nn.Parameter) -> None:
        parameter[(0,) * parameter.dim()] = value

    return _weights(poison)


def _zeroed(_name: str, parameter: nn.Parameter) -> None:
    parameter.zero_()


def _turned(_name: str, parameter: nn.Parameter) -> None:
    """The same values, not contiguous."""
    if parameter.dim() >= 2:
        parameter.data = parameter.data.transpose(-1, -2).contiguous().transpose(-1, -2)


def _shared_weight(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Two experts own one parameter."""
    experts = [expert for expert in _experts(model) if next(expert.parameters(), None) is not None]
    if len(experts) >= 2:
        name, parameter = next(iter(experts[0].named_parameters()))
        owner, _, own = name.rpartition(".")
        setattr(experts[1].get_submodule(owner), own, parameter)
    return model, args, kwargs


def _tied_experts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """One expert stands in two places."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) >= 3:
            module[1] = module[0]
    return model, args, kwargs


def _dead_expert(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """One expert's weights are zeros."""
    for parameter in (_experts(model) or [nn.Identity()])[0].parameters():
        parameter.data.zero_()
    return model, args, kwargs


def _odd_buffer(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Buffers of unusual kinds."""
    model.register_buffer("scale_of_nothing", torch.tensor(2.0, dtype=torch.float64))
    model.register_buffer("empty", torch.empty(0, 3))
    return model, args, kwargs


def _without_last(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    return model, args[:-1], dict(list(kwargs.items())[:-1])


def _scalar_time(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The time is a Python number."""
    return (model, (args[0], 0.5, *args[2:]), kwargs) if args else (model, args, {**kwargs, "timestep": 0.5})


def _extra_keyword(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    return model, args, {**kwargs, "guidance": 2}


def _training(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    return model.train(), args, kwargs


def _gradients(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    return model.requires_grad_(True), *_mapped(args, kwargs, lambda t: t.detach().requires_grad_())


MUTATIONS: dict[str, Mutation] = {
    "bf16": _cast(torch.bfloat16, True),
    "fp16": _cast(torch.float16, True),
    "fp64": _cast(torch.float64, True),
    "weights of another dtype": _cast(torch.bfloat16, False),
    "integer inputs": _inputs(lambda t: t.long()),
    "no tokens": _inputs(lambda t: t[:, :0], 2),
    "one token": _inputs(lambda t: t[:, :1], 3),
    "no samples": _inputs(lambda t: t[:0], 1),
    "constant inputs": _inputs(torch.ones_like),
    "zero inputs": _inputs(torch.zeros_like),
    "huge inputs": _inputs(lambda t: t * 1e30, 2),
    "NaN inputs": _inputs(lambda t: t * float("nan"), 2),
    "inputs without axes": _inputs(lambda t: t.flatten()[:1].sum()),
    "other rank": _inputs(lambda t: t[None], 2),
    "expanded inputs": _inputs(lambda t: t[:1].expand(t.shape), 1),
    "turned inputs": _inputs(lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2), 2),
    "lists of inputs": _inputs(lambda t: [t], 2),
    "inputs on no device": _inputs(lambda t: t.to("meta")),
    "NaN weights": _poisoned(float("nan")),
    "infinite weights": _poisoned(float("inf")),
    "zero weights": _weights(_zeroed),
    "turned weights": _weights(_turned),
    "shared weight": _shared_weight,
    "tied experts": _tied_experts,
    "dead expert": _dead_expert,
    "odd buffers": _odd_buffer,
    "missing input": _without_last,
    "scalar time": _scalar_time,
    "unknown keyword": _extra_keyword,
    "training": _training,
    "gradients": _gradients,
}
