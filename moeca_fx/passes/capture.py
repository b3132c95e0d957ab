"""capture: trace the unmodified model into an FX graph of ATen nodes, batch size left open.

    nn.Module                                  x = placeholder; ...
      blocks.1.mlp.experts(x, ids, w)    -->   experts = moeca.experts(view, ids, w, 'blocks.1.mlp.experts')
        (a Python loop that cannot be traced)  ...

Each proven region is swapped, on the instance and only for the time of tracing, for the marker op `moeca::experts`.
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
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from moeca_fx.discover import MoERegion
from moeca_fx.discover.prove import replaced_method
from moeca_fx.errors import CaptureError, InputError
from moeca_fx.graph.functional import functional_module
from moeca_fx.model_checks import has_no_data
from moeca_fx.ops.experts import live_regions
from moeca_fx.passes.batch import at_least_two, batch_axis, batch_size
from moeca_fx.passes.follow import check_same_values, known_values, run_following

_unique = itertools.count()


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
    with torch.no_grad():
        try:
            # What the model itself cannot run is no fault of the trace.
            expected, seen = run_following(model, keyed.values(), args, kwargs) if on_data else (None, [])
        except InputError as error:
            if own_batch:
                raise
            raise _BatchFixedError(f"it does not run on two samples: {error}") from error
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_regions_as_markers(model, keyed))
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
                f"proven mixture-of-experts region is the usual cause{where}"
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
    with live_regions({key: _region_call(model, region) for key, region in keyed.items()}):
        _check_bit_equal(model, captured, args, kwargs, expected)
        other = _second_input(args, kwargs)
        with torch.no_grad():
            wanted, again = run_following(model, keyed.values(), *other)
        _check_bit_equal(model, captured, *other, wanted)
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


@contextmanager
def _regions_as_markers(model: nn.Module, keyed: Mapping[str, MoERegion]) -> Iterator[None]:
    with ExitStack() as stack:
        for key, region in keyed.items():
            owner = model.get_submodule(region.path)
            stack.enter_context(replaced_method(owner, region.method, _marker(owner, region, key)))
        yield


def _marker(owner: nn.Module, region: MoERegion, key: str) -> Any:
    signature = inspect.signature(getattr(owner, region.method))

    def call_marker(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        marked: Tensor = torch.ops.moeca.experts(given[region.x], given[region.expert], given[region.weight], key)
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
