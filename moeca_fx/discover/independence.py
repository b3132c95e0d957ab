"""Samples must not see each other: with the first one changed, what the others give stays.

    batch [a, b, c]  ->  outputs [A, B, C]          known from discovery
    batch [a', b, c] ->  outputs [A', B, C]         B and C changed: the model mixes samples

A router whose capacity, top-k or normalisation runs over all tokens of the batch computes something else for a sample
when its neighbours change, and so no cache can be right for the sample alone.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.autocast import computed_in
from moeca_fx.batch import batch_axis, batch_size
from moeca_fx.errors import UnsupportedModelError
from moeca_fx.reasons import Reason

# Largest root mean square of the change, relative to the output's: rounding differs with the rows of an expert, and may
# turn a near tie between two experts of a few tokens.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 2e-2}

Call = tuple[tuple[Any, ...], dict[str, Any]]


def change_first_sample(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Inputs with another first sample.

    The new sample is constant, which sends its tokens to few experts: whatever is shared between samples runs full.
    Of ids [B, T] only the later half changes. Conditions stay: some of them belong to no sample.
    """
    size = batch_size(args, kwargs)
    sample = _sample(model, args, kwargs, size)

    def change(leaf: Any) -> Any:
        axis = batch_axis(leaf, size)
        if axis is None or not isinstance(leaf, Tensor):
            return leaf
        changed = leaf.clone()
        if leaf is sample and leaf.is_floating_point():
            changed[0] = 4 * leaf.abs().mean()
        elif leaf is sample:
            changed[0, leaf.shape[1] // 2 :] = leaf[0, 0]
        return changed

    return pytree.tree_map(change, args), pytree.tree_map(change, dict(kwargs))


def _sample(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int) -> Tensor | None:
    """What is denoised: the first floating-point input by forward's signature; where there is none, the first ids."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    leaves = [leaf for leaf in pytree.tree_leaves(list(bound.values())) if isinstance(leaf, Tensor) and leaf.dim() > 1]
    batched = [leaf for leaf in leaves if leaf.shape[0] == size and leaf.dtype != torch.bool]
    return next(iter([leaf for leaf in batched if leaf.is_floating_point()] or batched), None)


def refuse_mixing(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, found: Any, size: int
) -> None:
    """Raise `UnsupportedModelError` when outputs of other samples changed with the first one.

    Args:
        model, args, kwargs: what was run.
        output, found: results on these inputs, and with another first sample.
        size: samples of the inputs.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(output)):
        return  # the proof says so: NaN changes with nothing
    error = max((change_of(a, b) / allowed(a) for a, b in _others(output, found, size)), default=0.0)
    if not error <= 1.0:
        place = _first_mixing(model, args, kwargs)
        raise UnsupportedModelError(
            f"{place}: per-sample independence is lost: what it computes for a sample changes with the other samples "
            f"of the batch (by {error:.0f} times what rounding may do); route over the tokens of each sample alone: "
            "capacity, top-k and normalisation must not run over the flattened batch",
            code=Reason.MIXES_SAMPLES,
        )


def _others(output: Any, found: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of every sample but the first of the changed call, in both calls."""
    for before, after in zip(tensors_of(output), tensors_of(found), strict=True):
        if 1 < size == before.shape[0] == after.shape[0]:
            yield before[1:], after[1:]


def tensors_of(result: Any) -> list[Tensor]:
    """The floating-point tensors of a model's result."""
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() and leaf.is_floating_point()]


def change_of(before: Tensor, after: Tensor) -> float:
    """Root mean square of the difference, relative to that of `before`."""
    difference = (after.double() - before.double()).square().mean()
    return float((difference / before.double().square().mean().clamp_min(1e-60)).sqrt())


def allowed(tensor: Tensor) -> float:
    """`TOLERANCE` of a tensor's dtype, under the autocast of now."""
    return TOLERANCE.get(computed_in(tensor.dtype), TOLERANCE[torch.float32])


def _first_mixing(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The first module to finish whose result for other samples changes with the first one; two runs."""
    size = batch_size(args, kwargs)
    runs: list[list[tuple[str, Tensor]]] = []
    for given in ((args, dict(kwargs)), change_first_sample(model, args, kwargs)):
        results: list[tuple[str, Tensor]] = []
        handles = [
            module.register_forward_hook(_recorder(path, results, size)) for path, module in model.named_modules()
        ]
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                model(*given[0], **given[1])
        finally:
            for handle in handles:
                handle.remove()
        runs.append(results)
    for (path, before), (other, after) in zip(*runs, strict=False):
        if path == other and before.shape == after.shape and change_of(before, after) > allowed(before):
            return path or type(model).__name__
    return type(model).__name__


def _recorder(path: str, results: list[tuple[str, Tensor]], size: int) -> Any:
    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        tensors = tensors_of(output)
        if tensors and tensors[0].shape[0] == size:
            results.append((path, tensors[0][1:].detach().clone()))

    return record
