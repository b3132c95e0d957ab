"""capture: trace the unmodified model into an FX graph of ATen nodes, batch size left open.

    nn.Module                                  x = placeholder; ...
      blocks.1.mlp.experts(x, ids, w)    -->   experts = moeca.experts(view, ids, w, 'blocks.1.mlp.experts')
        (a Python loop that cannot be traced)  ...

Each proven region is swapped, on the instance and only for the time of tracing, for the marker op `moeca::experts`
(`markers`). `torch.fx.symbolic_trace` fails on every DiT-MoE; `make_fx` on real tensors bakes one input's routing in
without a word. Non-strict `torch.export` does neither, and the result is compared with the model, on a second input
too: bit for bit, unless a block is replayed.
"""

import inspect
import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from moeca_fx.batch import at_least_two, batch_size, doubled, other_values
from moeca_fx.discover import MoERegion
from moeca_fx.discover.inline.block import Call
from moeca_fx.discover.probe import calls_of
from moeca_fx.discover.reference import TOLERANCE
from moeca_fx.errors import CaptureError
from moeca_fx.graph.functional import functional_module
from moeca_fx.model_checks import run_once
from moeca_fx.ops.experts import live_regions
from moeca_fx.passes.markers import marked_regions, region_call, regions_as_markers
from moeca_fx.reasons import Reason

_unique = itertools.count()
_REPLAYED = 10.0  # how often the tolerance of one region a model of many may differ by


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
    inline = {region.path for region in regions if region.inline}
    other = doubled(args, kwargs) if inline else _second_input(args, kwargs)
    small: dict[str, list[Call]] = {}
    large: dict[str, list[Call]] = {}
    with torch.no_grad():  # what the model itself cannot run is no fault of the trace
        with calls_of(model, inline, small, batch_size(args, kwargs)):
            expected = run_once(model, args, kwargs)
        with calls_of(model, inline, large, batch_size(*other)):
            expected_of_other = run_once(model, *other)
    marked = marked_regions(model, keyed, small, large)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(regions_as_markers(model, marked))
        try:
            program = torch.export.export(
                model, args, dict(kwargs), dynamic_shapes=_dynamic_batch(model, args, kwargs), strict=False
            )
            module = functional_module(program)
        except Exception as error:  # torch.export raises many unrelated types; each becomes one clear error
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CaptureError(
                f"torch.export could not trace {type(model).__name__}: {first_line}; data-dependent Python outside a "
                "proven mixture-of-experts region is the usual cause",
                code=Reason.NOT_TRACEABLE,
            ) from error
    in_spec, out_spec = module._in_spec, module._out_spec
    assert in_spec is not None and out_spec is not None, "an exported module knows its structure"
    module.graph.set_codegen(fx.graph.CodeGen())
    module._forward_pre_hooks.clear()  # they check the original signature; this graph takes the flat inputs
    _flatten_output(module)
    _check_batch_open(model, module, args, kwargs)
    captured = Captured(module, in_spec, out_spec, keyed)
    with live_regions({each.key: region_call(model, each) for each in marked}):
        _check_equal(model, captured, args, kwargs, expected, bool(inline))
        _check_equal(model, captured, *other, expected_of_other, bool(inline))
    return captured


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
                "the trace); expected an open one: replace Python loops over the batch by tensor operations",
                code=Reason.FIXED_BATCH,
            )


def _flatten_output(module: fx.GraphModule) -> None:
    output = module.graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    module.recompile()


def _second_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Another input of the same shapes: floats scaled and mirrored, integers in another order."""

    return pytree.tree_map(other_values, args), pytree.tree_map(other_values, dict(kwargs))


def _check_equal(
    model: nn.Module,
    captured: Captured,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    expected: Any,
    replayed: bool,
) -> None:
    """Bit for bit; to rounding where a replayed block adds its experts in another order than the model."""
    with torch.no_grad():
        found = captured.module(*pytree.tree_leaves((args, dict(kwargs))))
    for index, (want, have) in enumerate(zip(pytree.tree_leaves(expected), found, strict=True)):
        if not isinstance(want, Tensor) or torch.equal(want, have):
            continue
        error = float((want - have).abs().max())
        allowed = _REPLAYED * TOLERANCE.get(want.dtype, 0.0) * float(want.abs().max()) if replayed else 0.0
        if not error <= allowed:
            raise CaptureError(
                f"output {index} of the captured graph differs from {type(model).__name__} by {error:.1e}, expected "
                + (f"at most {allowed:.1e}" if replayed else "equality bit for bit")
                + "; the model may hold state, dropout or data-dependent Python",
                code=Reason.TRACE_DIFFERS,
            )
