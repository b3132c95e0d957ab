"""capture: trace the unmodified model into an FX graph of ATen nodes, batch size left open.

    nn.Module                                  x = placeholder; ...
      blocks.1.mlp.experts(x, ids, w)    -->   experts = moeca.experts(view, ids, w, 'blocks.1.mlp.experts')
        (a Python loop that cannot be traced)  ...

Each proven region is swapped, on the instance and only for the time of tracing, for a marker op (`ops.experts`).
`torch.fx.symbolic_trace` fails on every DiT-MoE; `make_fx` on real tensors bakes one input's routing in without a word.
Non-strict `torch.export` does neither, and the result is compared with the model bit for bit, on a second input too.
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from moeca_fx.discover import MoERegion
from moeca_fx.discover.prove import replaced_method
from moeca_fx.errors import CaptureError, InputError
from moeca_fx.graph.functional import functional_module
from moeca_fx.model_checks import run_once
from moeca_fx.ops.experts import MARKERS, live_regions

_unique = itertools.count()


@dataclass(frozen=True)
class Captured:
    """A traced model.

    Attributes:
        module: graph over the flat inputs; its output is the tuple of flat outputs.
        in_spec, out_spec: how (args, kwargs) and the result unfold into flat lists.
        regions: marker key in the graph -> the region it stands for.
    """

    module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    regions: dict[str, MoERegion]


def capture(
    model: nn.Module, regions: tuple[MoERegion, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Captured:
    """Trace `model` on example inputs and prove the trace equal to it, bit for bit.

    Args:
        model: in eval mode; unchanged afterwards.
        regions: proven regions (`moeca_fx.discover`).
        args, kwargs: example inputs. A batch of one is doubled for tracing, so that the batch stays dynamic.

    Raises:
        InputError: the model cannot run on these inputs.
        CaptureError: torch.export cannot trace the model, or the trace does not reproduce it.
    """
    args, kwargs = at_least_two(args, kwargs)
    keyed = {f"{region.path}.{region.method}#{next(_unique)}": region for region in regions}
    with torch.no_grad():
        expected = run_once(model, args, kwargs)  # what the model itself cannot run is no fault of the trace
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_regions_as_markers(model, keyed))
        try:
            program = torch.export.export(
                model, args, dict(kwargs), dynamic_shapes=_dynamic_batch(model, args, kwargs), strict=False
            )
            module = functional_module(program)
        except Exception as error:  # torch.export raises many unrelated types; each becomes one clear error
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CaptureError(
                f"torch.export could not trace {type(model).__name__}: {first_line}; data-dependent Python outside a "
                "proven mixture-of-experts region is the usual cause"
            ) from error
    in_spec, out_spec = module._in_spec, module._out_spec
    assert in_spec is not None and out_spec is not None, "an exported module knows its structure"
    module.graph.set_codegen(fx.graph.CodeGen())
    module._forward_pre_hooks.clear()  # they check the original signature; this graph takes the flat inputs
    _flatten_output(module)
    _check_batch_open(model, module, args, kwargs)
    captured = Captured(module, in_spec, out_spec, keyed)
    with live_regions({key: _region_call(model, region) for key, region in keyed.items()}):
        _check_bit_equal(model, captured, args, kwargs, expected)
        other = _second_input(args, kwargs)
        with torch.no_grad():
            _check_bit_equal(model, captured, *other, model(*other[0], **other[1]))
    return captured


def at_least_two(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one: torch.export would fix a batch size of 1 in the graph."""
    size = batch_size(args, kwargs)
    if size != 1:
        return args, dict(kwargs)

    def double(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 1 else leaf

    return pytree.tree_map(double, args), pytree.tree_map(double, dict(kwargs))


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The leading size that most tensor inputs of at least two dimensions share; of one dimension, if there are none.

    Raises:
        InputError: no tensor with a batch dimension among the inputs.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = [int(leaf.shape[0]) for leaf in tensors if leaf.dim() > 1] or [int(leaf.shape[0]) for leaf in tensors]
    if not sizes:
        raise InputError(
            "example inputs: expected at least one tensor with a leading batch dimension, found none; "
            "pass example_inputs=(x, t, ...) as the model's forward takes them"
        )
    return max(sizes, key=sizes.count)  # the first of equally frequent ones


def _dynamic_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Per parameter of forward: which dimensions torch.export keeps open."""
    size = batch_size(args, kwargs)

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return {0: torch.export.Dim.AUTO} if leaf.dim() and leaf.shape[0] == size else {}
        return None

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(mark, value) for name, value in given.items()}


def _check_batch_open(
    model: nn.Module, module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    size = batch_size(args, kwargs)
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    for node, leaf in zip(module.graph.find_nodes(op="placeholder"), leaves, strict=True):
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        if batched and not free_symbols(node.meta["val"].shape[0]):
            raise CaptureError(
                f"{type(model).__name__}: its own code fixes the batch size (input {node.name!r} has {size} samples in "
                "the trace); expected an open one: replace Python loops over the batch by tensor operations"
            )


@contextmanager
def _regions_as_markers(model: nn.Module, keyed: Mapping[str, MoERegion]) -> Iterator[None]:
    with ExitStack() as stack:
        for key, region in keyed.items():
            owner = model.get_submodule(region.path)
            stack.enter_context(replaced_method(owner, region.method, _marker(owner, region, key)))
        yield


def _marker(owner: nn.Module, region: MoERegion, key: str) -> Any:
    signature, marker = inspect.signature(getattr(owner, region.method)), MARKERS[region.layout]

    def call_marker(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        marked: Tensor = marker(given[region.x], given[region.expert], given[region.weight], key)
        return marked

    return call_marker


def _region_call(model: nn.Module, region: MoERegion) -> Any:
    method = getattr(model.get_submodule(region.path), region.method)

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = method(**{region.x: x, region.expert: expert, region.weight: weight})
        return result

    return run


def _flatten_output(module: fx.GraphModule) -> None:
    output = module.graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    module.recompile()


def _second_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Another input of the same shapes: floats scaled and mirrored, integers in another order."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        return leaf.flip(0) * 0.75 if leaf.is_floating_point() else leaf.flip(0)

    return pytree.tree_map(change, args), pytree.tree_map(change, dict(kwargs))


def _check_bit_equal(
    model: nn.Module, captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any], expected: Any
) -> None:
    with torch.no_grad():
        found = captured.module(*pytree.tree_leaves((args, dict(kwargs))))
    for index, (want, have) in enumerate(zip(pytree.tree_leaves(expected), found, strict=True)):
        if isinstance(want, Tensor) and not torch.equal(want, have):
            error = float((want - have).abs().max())
            raise CaptureError(
                f"output {index} of the captured graph differs from {type(model).__name__} by {error:.1e}, expected "
                "equality bit for bit; the model may hold state, dropout or data-dependent Python"
            )
