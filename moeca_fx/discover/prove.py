"""Prove what a traced region computes: ``sum_k weight_k * expert_k(x)``, with roles found by shape and value."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.discover import expert_choice
from moeca_fx.discover.probe import TracedRegion
from moeca_fx.discover.records import MoERegion, Refusal

# Largest accepted error relative to the largest output. The reference accumulates in fp64, the model in its own dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

Call = tuple[dict[str, Any], Any]


def prove(
    model: nn.Module, traced: list[TracedRegion], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[MoERegion], list[Refusal]]:
    """Run the model once with every region spied on, then prove each region from what it got and returned."""
    seen: dict[tuple[str, str], list[Call]] = {}
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for region in traced:
            key = (region.owner, region.method)
            if key not in seen:
                seen[key] = []
                stack.enter_context(_spied(modules[region.owner], region.method, seen[key]))
        if traced:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                model(*args, **kwargs)
    results = [_prove_region(region, seen[region.owner, region.method]) for region in traced]
    proven = [result for result in results if isinstance(result, MoERegion)]
    refused = [result for result in results if isinstance(result, Refusal)]
    return proven, refused


@contextmanager
def replaced_method(owner: nn.Module, name: str, function: Any) -> Iterator[None]:
    """Shadow a method on the instance inside the block; the class and other instances keep theirs."""
    had, old = name in owner.__dict__, owner.__dict__.get(name)
    object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        if had:
            object.__setattr__(owner, name, old)
        else:
            object.__delattr__(owner, name)


@contextmanager
def _spied(owner: nn.Module, name: str, calls: list[Call]) -> Iterator[None]:
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def spy(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in bound.arguments.items()}
        output = original(*args, **kwargs)
        calls.append((before, output))
        return output

    with replaced_method(owner, name, spy):
        yield


def _prove_region(region: TracedRegion, calls: list[Call]) -> MoERegion | Refusal:
    name = f"{region.owner}.{region.method}"

    def refuse(reason: str) -> Refusal:
        return Refusal(region.candidate.path, f"{name}: {reason}", is_moe=True)

    if len(calls) != 1:
        return refuse(f"called {len(calls)} times in one forward; exactly one call is supported")
    arguments, output = calls[0]
    if not isinstance(output, Tensor):
        return refuse(f"returns {type(output).__name__}; expected one tensor")
    if not bool(torch.isfinite(output).all()):
        return refuse("returned NaN or infinity in the probe run; check the weights and the example inputs")
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    rows = [k for k, v in tensors.items() if v.is_floating_point() and v.shape == output.shape]
    ids = [k for k, v in tensors.items() if not v.is_floating_point() and v.dtype != torch.bool and v.dim() >= 1]
    weights = [k for k, v in tensors.items() if v.is_floating_point()]
    if (found := _by_expert_choice(region, tensors, output)) is not None:
        return found
    nearest, reason = float("inf"), "no arguments have the shapes of token rows, expert ids and routing weights"
    for x, expert, weight in product(rows, ids, weights):
        if weight == x or tensors[weight].numel() != tensors[expert].numel():
            continue
        try:
            error = _error(region, tensors[x], tensors[expert], tensors[weight], output)
        except (RuntimeError, TypeError, ValueError) as problem:
            reason = f"an expert could not be run on token rows alone: {problem}"
            continue
        nearest = min(nearest, error)
        if error <= TOLERANCE.get(output.dtype, 0.0):
            count = tensors[x].numel() // tensors[x].shape[-1]
            return MoERegion(
                path=region.owner,
                method=region.method,
                block=region.block,
                experts=tuple(path for path, _ in region.candidate.experts),
                top_k=tensors[expert].numel() // count,
                x=x,
                expert=expert,
                weight=weight,
                error=error,
                empty_slots=bool((tensors[expert] == len(region.candidate.experts)).any()),
            )
        limit = TOLERANCE.get(output.dtype, 0.0)
        reason = f"sum_k weight_k * expert_k(x) differs from its output by {nearest:.1e} relative (allowed {limit:.0e})"
    return refuse(reason)


def _by_expert_choice(region: TracedRegion, tensors: Mapping[str, Tensor], output: Tensor) -> MoERegion | None:
    """The region whose experts chose their tokens, if its arguments and its result prove that."""
    experts = [module for _, module in region.candidate.experts]
    for x, token, weight in expert_choice.candidate_roles(tensors, len(experts)):
        if tensors[x].shape != output.shape:
            continue
        try:
            error = expert_choice.error_of(experts, tensors[x], tensors[token], tensors[weight], output)
        except (RuntimeError, TypeError, ValueError):  # its experts take something else than these rows
            continue
        if error <= TOLERANCE.get(output.dtype, 0.0):
            return MoERegion(
                path=region.owner,
                method=region.method,
                block=region.block,
                experts=tuple(path for path, _ in region.candidate.experts),
                top_k=tensors[token].shape[-1],
                x=x,
                expert=token,
                weight=weight,
                error=error,
                layout="expert",
            )
    return None


def _error(region: TracedRegion, x: Tensor, expert: Tensor, weight: Tensor, output: Tensor) -> float:
    """Largest difference between the region's output and the sum over its experts, relative to the output."""
    tokens = x.reshape(-1, x.shape[-1])
    ids = expert.reshape(tokens.shape[0], -1)  # [N, k]
    scale = weight.reshape(tokens.shape[0], -1).double()
    total = torch.zeros(tokens.shape, dtype=torch.float64, device=x.device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for index, (_, module) in enumerate(region.candidate.experts):
            token, slot = torch.where(ids == index)
            if token.numel():
                contribution = module(tokens[token]).double() * scale[token, slot].unsqueeze(-1)
                total.index_add_(0, token, contribution)
    difference = (total - output.reshape(tokens.shape).double()).abs().max()
    return float(difference / output.abs().max().double().clamp_min(1e-30))
