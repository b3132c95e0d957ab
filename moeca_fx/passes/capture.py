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
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from moeca_fx.autocast import OFF, Autocast
from moeca_fx.batch import at_least_two, batch_axis, batch_size, doubled, other_values
from moeca_fx.discover import MoERegion
from moeca_fx.discover.calls import Call
from moeca_fx.discover.probe import calls_of
from moeca_fx.discover.reference import tolerance_of
from moeca_fx.errors import CaptureError, InputError
from moeca_fx.graph.functional import functional_module
from moeca_fx.model_checks import has_no_data
from moeca_fx.ops.experts import live_regions
from moeca_fx.passes.follow import Scalars, check_same_values, known_values, run_following
from moeca_fx.passes.markers import dtypes_seen, is_replayed, marked_regions, region_call, regions_as_markers
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
        batch: the one batch size that the graph is for; None leaves it open.
        why_fixed: why the batch size could not be left open; None where it is.
        proven: whether the graph was compared with the model on data; a model on the meta device has none.
    """

    module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    regions: dict[str, MoERegion]
    batch: int | None = None
    why_fixed: str | None = None
    proven: bool = True


class _BatchFixedError(CaptureError):
    """The batch size cannot be left open; a trace for one size may exist."""


def capture(
    model: nn.Module,
    regions: tuple[MoERegion, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    fixed: str | None = None,
) -> Captured:
    """Trace `model` on example inputs and prove the trace equal to it, bit for bit.

    Args:
        model: in eval mode; unchanged afterwards.
        regions: proven regions (`moeca_fx.discover`).
        args, kwargs: example inputs. A batch of one is doubled for tracing, so that the batch stays dynamic. Where the
            model's own code fixes the batch size, the trace is for that of the inputs.
        fixed: why the batch size is known to be fixed; None tries to leave it open first.

    Raises:
        InputError: the model cannot run on these inputs.
        CaptureError: torch.export cannot trace the model, or the trace does not reproduce it.
    """
    keyed = {f"{region.path}.{region.method}#{next(_unique)}": region for region in regions}
    if fixed is None:
        captured, fixed = _with_open_batch(model, keyed, *at_least_two(args, kwargs))
        if captured is not None:
            return captured
    return _prove_and_keep(model, keyed, args, dict(kwargs), fixed)


def _with_open_batch(
    model: nn.Module, keyed: dict[str, MoERegion], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Captured | None, str]:
    """A trace for any batch size, or why there is none."""
    try:
        return _prove_and_keep(model, keyed, args, kwargs, None), ""
    except _BatchFixedError as error:
        return None, str(error)


def _prove_and_keep(
    model: nn.Module, keyed: dict[str, MoERegion], args: tuple[Any, ...], kwargs: dict[str, Any], fixed: str | None
) -> Captured:
    """Trace on these inputs and compare with the model.

    Args:
        fixed: why the batch size is that of the inputs; None leaves it open.

    Raises:
        _BatchFixedError: it cannot be left open.
    """
    on_data = not has_no_data(model)
    own_batch = fixed is not None
    inline = {region.path for region in keyed.values() if region.inline}
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    small: dict[str, list[Call]] = {}
    large: dict[str, list[Call]] = {}
    expected, more = None, None
    seen: Scalars = []
    again: Scalars = []
    other = doubled(args, kwargs) if inline and not own_batch else _second_input(args, kwargs)
    if on_data:
        try:  # what the model itself cannot run is no fault of the trace
            with torch.no_grad():
                with calls_of(model, inline, small, batch_size(args, kwargs)), dtypes_seen(model, keyed, dtypes):
                    expected, seen = run_following(model, keyed.values(), args, kwargs)
                if inline and own_batch:
                    with calls_of(model, inline, large, 2 * batch_size(args, kwargs)):
                        run_following(model, keyed.values(), *doubled(args, kwargs))
                with calls_of(model, set() if own_batch else inline, large, 2 * batch_size(args, kwargs)):
                    more, again = run_following(model, keyed.values(), *other)
                if inline and not own_batch:  # `other` has more samples
                    _, again = run_following(model, keyed.values(), *_second_input(args, kwargs))
        except InputError as error:
            if own_batch:
                raise
            raise _BatchFixedError(f"it does not run on two samples: {error}") from error
    with torch.no_grad():
        marked = marked_regions(model, keyed, small, large, dtypes if Autocast.now().dtypes else {})
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(regions_as_markers(model, marked))
        known = stack.enter_context(known_values(model))
        shapes = None if own_batch else _dynamic_batch(model, args, kwargs)
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            if not own_batch:
                _check_batch_open(program, args, kwargs)
            module = functional_module(program)
        except _BatchFixedError:
            raise
        except Exception as error:  # torch.export raises many unrelated types; each becomes one clear error
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if not own_batch:
                raise _BatchFixedError(first_line) from error
            where = f"; Python reads the value of a tensor in {', '.join(known.unknown[:3])}" if known.unknown else ""
            raise CaptureError(
                f"torch.export could not trace {type(model).__name__}: {first_line}; data-dependent Python outside a "
                f"proven mixture-of-experts region is the usual cause{where}",
                code=Reason.NOT_TRACEABLE,
            ) from error
    in_spec, out_spec = module._in_spec, module._out_spec
    assert in_spec is not None and out_spec is not None, "an exported module knows its structure"
    module.graph.set_codegen(fx.graph.CodeGen())
    module._forward_pre_hooks.clear()  # they check the original signature; this graph takes the flat inputs
    _flatten_output(module)
    batch = batch_size(args, kwargs) if own_batch else None
    captured = Captured(module, in_spec, out_spec, keyed, batch, fixed, proven=on_data)
    if not on_data:
        return captured
    with live_regions({each.key: region_call(model, each) for each in marked}):
        replayed = _dtypes(model, {each.region.path for each in marked if is_replayed(model, each)})
        _check_equal(model, captured, args, kwargs, expected, replayed)
        _check_equal(model, captured, *other, more, replayed)
    check_same_values(model, seen, again)
    return captured


def _dynamic_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Per parameter of forward: which dimensions torch.export keeps open."""
    size = batch_size(args, kwargs)

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            axis = batch_axis(leaf, size)
            return {} if axis is None else {axis: torch.export.Dim.AUTO}
        return None

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(mark, value) for name, value in given.items()}


def _check_batch_open(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise `_BatchFixedError` when the trace holds for the traced batch size alone."""
    size = batch_size(args, kwargs)
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    inputs = program.graph.find_nodes(op="placeholder")[-len(leaves) :]  # behind parameters and buffers
    for node, leaf in zip(inputs, leaves, strict=True):
        axis = batch_axis(leaf, size)
        if axis is not None and not free_symbols(node.meta["val"].shape[axis]):
            raise _BatchFixedError(
                f"its own code fixes the batch size (input {node.name!r} has {size} samples in the trace), as a Python "
                "loop over the samples does"
            )


def _flatten_output(module: fx.GraphModule) -> None:
    output = module.graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    module.recompile()


def _second_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Another input of the same shapes: floats scaled and mirrored, integers in another order."""

    return pytree.tree_map(other_values, args), pytree.tree_map(other_values, dict(kwargs))


def _dtypes(model: nn.Module, paths: Iterable[str]) -> frozenset[torch.dtype]:
    """What blocks compute in: what a model returns in fp32 may have been rounded to bf16 on the way."""
    return frozenset(parameter.dtype for path in paths for parameter in model.get_submodule(path).parameters())


def _check_equal(
    model: nn.Module,
    captured: Captured,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    expected: Any,
    replayed: frozenset[torch.dtype],
) -> None:
    """Bit for bit; to rounding where a replayed block adds its experts in another order than the model.

    `replayed` are the dtypes of such blocks.
    """
    with torch.no_grad(), OFF.around():  # the graph has autocast's casts
        found = captured.module(*pytree.tree_leaves((args, dict(kwargs))))
    for index, (want, have) in enumerate(zip(pytree.tree_leaves(expected), found, strict=True)):
        if not isinstance(want, Tensor) or torch.equal(want, have):
            continue
        error = float((want - have).abs().max())
        rounding = max(tolerance_of(dtype) for dtype in (want.dtype, *replayed)) if replayed else 0.0
        allowed = _REPLAYED * rounding * float(want.abs().max())
        if not error <= allowed:
            raise CaptureError(
                f"output {index} of the captured graph differs from {type(model).__name__} by {error:.1e}, expected "
                + (f"at most {allowed:.1e}" if replayed else "equality bit for bit")
                + "; the model may hold state, dropout or data-dependent Python",
                code=Reason.TRACE_DIFFERS,
            )
