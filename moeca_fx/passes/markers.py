"""Markers: while a model is traced, every proven region is one call of a marker op.

    a dispatching method                                 a block with its router inside
      moe_infer(x, ids, w)  -->  experts(x, ids, w, key)   forward(x)  -->  its recipe, experts(..., key) in its middle

Recipes hold sizes, so they are recorded anew for the inputs at hand.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moeca_fx.autocast import Autocast
from moeca_fx.discover import MoERegion
from moeca_fx.discover.calls import Call
from moeca_fx.discover.experts import as_expert, expert_modules
from moeca_fx.discover.inline.block import Marker, reference_marker
from moeca_fx.discover.inline.holders import prove_modules, prove_stacked
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.method import replaced_method
from moeca_fx.errors import UnprovenRegionError
from moeca_fx.ops.experts import MARKERS
from moeca_fx.registry.proof import EntryBlock

Calls = Mapping[str, list[Call]]


class Replay(Protocol):
    """Computes a call with its routed experts left to a marker."""

    @property
    def free(self) -> tuple[int, ...]:
        """Ids of experts without parameters."""

    def run(
        self, owner: nn.Module, experts: Sequence[nn.Module], marker: Marker, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """The call's result."""


@dataclass(frozen=True)
class Marked:
    """A region while its model is traced.

    Attributes:
        key: of its marker in the graph.
        region: what it is.
        block: how to replay it; None for a dispatching method.
        dtypes: of the method's rows and result, where autocast makes them differ; a marker's are equal.
    """

    key: str
    region: MoERegion
    block: Replay | None
    dtypes: tuple[torch.dtype, torch.dtype] | None = None


def marked_regions(
    model: nn.Module,
    keyed: Mapping[str, MoERegion],
    small: Calls,
    large: Calls,
    dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]],
) -> list[Marked]:
    """Regions ready to be traced.

    Args:
        model: the model.
        keyed: marker key -> region.
        small, large: calls of the owners of inline regions in two runs of the model, of different batch sizes; none
            on the meta device.
        dtypes: of the rows and results of dispatching methods, by marker key, where they are known to differ.

    Raises:
        UnprovenRegionError: an inline region is not proven on these inputs.
    """
    return [
        Marked(key, region, _block(model, region, small, large) if region.inline else None, dtypes.get(key))
        for key, region in keyed.items()
    ]


@contextmanager
def dtypes_seen(
    model: nn.Module, keyed: Mapping[str, MoERegion], found: dict[str, tuple[torch.dtype, torch.dtype]]
) -> Iterator[None]:
    """Note the dtypes of rows and result of every dispatching method that is called inside the block, by marker key."""
    with ExitStack() as stack:
        for key, region in keyed.items():
            if not region.inline:
                owner = model.get_submodule(region.path)
                watched = _noting_dtypes(getattr(owner, region.method), region.x, key, found)
                stack.enter_context(replaced_method(owner, region.method, watched))
        yield


def _noting_dtypes(method: Any, x: str, key: str, found: dict[str, tuple[torch.dtype, torch.dtype]]) -> Any:
    signature = inspect.signature(method)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = method(*args, **kwargs)
        rows: Tensor = signature.bind(*args, **kwargs).arguments[x]
        found[key] = (rows.dtype, result.dtype)
        return result

    return run


def _block(model: nn.Module, region: MoERegion, small: Calls, large: Calls) -> Replay:
    if region.entry is not None:
        return EntryBlock(region.entry)  # its code holds no sizes; the whole trace is compared with the model
    if region.proven_on:  # without data there is no call to record
        assert region.replay is not None, f"{region.path}: an inline region was proven by a replay"
        return region.replay
    calls = (small[region.path][0], large[region.path][0])
    try:
        if region.form is not None:
            count = region.num_experts
            return prove_stacked(model, region.container, count, region.path, *calls, region.form)[0]
        return prove_modules(model, _all_experts(region), region.keyword, region.path, *calls)
    except NotReplayable as reason:
        raise UnprovenRegionError(
            f"{region.path}: was proven on the inputs of transform, and is not on those of this call: {reason}",
            code=reason.code,
        ) from reason


def _all_experts(region: MoERegion) -> list[str]:
    """Paths of all experts by id, those without parameters in their places."""
    paths = list(region.experts)
    for index, path in region.free:
        paths.insert(index, path)
    return paths


@contextmanager
def regions_as_markers(model: nn.Module, marked: list[Marked]) -> Iterator[None]:
    """Inside the block the regions' methods are calls of markers; only on this instance."""
    with ExitStack() as stack:
        for each in marked:
            owner = model.get_submodule(each.region.path)
            stack.enter_context(replaced_method(owner, each.region.method, _traced(model, owner, each)))
        yield


def _traced(model: nn.Module, owner: nn.Module, each: Marked) -> Any:
    if each.block is not None:
        return _replay(model, owner, each, each.block)
    region, key = each.region, each.key
    signature = inspect.signature(getattr(owner, region.method))

    def call_marker(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        chosen: Tensor = given[region.expert]
        if region.empty_slots:  # a method skips every id that it has no expert for; past the markers only E means none
            chosen = chosen.clamp(max=region.num_experts)
        rows: Tensor = given[region.x]
        if each.dtypes is None:
            return _marker(region, key)(rows, chosen, given[region.weight])
        wide = rows.to(torch.promote_types(*each.dtypes))
        return _marker(region, key)(wide, chosen, given[region.weight]).to(each.dtypes[1])

    return call_marker


def _replay(model: nn.Module, owner: nn.Module, each: Marked, block: Replay) -> Any:
    experts = _for_replay(model, each.region)

    def replay(*args: Any, **kwargs: Any) -> Any:
        return block.run(owner, experts, _marker(each.region, each.key), args, kwargs)

    return replay


def _for_replay(model: nn.Module, region: MoERegion) -> list[nn.Module]:
    """Experts by id; those with parameters are behind the marker."""
    if region.form is not None or region.entry is not None:
        return expert_modules(model, region)
    return [as_expert(model.get_submodule(path), region.keyword) for path in _all_experts(region)]


def _marker(region: MoERegion, key: str) -> Marker:
    op = MARKERS[region.layout]

    def marker(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        marked: Tensor = op(x, chosen, weight, key)
        return marked

    return marker


def region_call(model: nn.Module, each: Marked) -> Marker:
    """What the marker stands for, to run the traced graph before its experts are lowered."""
    region, autocast = each.region, Autocast.now()
    if is_replayed(model, each):
        experts, free = _for_replay(model, region), each.block.free if each.block is not None else ()
        return _around(autocast, reference_marker(experts, free, region.layout == "expert"))
    method = getattr(model.get_submodule(region.path), region.method)

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        rows = x if each.dtypes is None else x.to(each.dtypes[0])
        result: Tensor = method(**{region.x: rows, region.expert: expert, region.weight: weight})
        return result if each.dtypes is None else result.to(x.dtype)

    return _around(autocast, run)


def is_replayed(model: nn.Module, each: Marked) -> bool:
    """Whether its experts run one by one where the model runs its method: to rounding the same.

    That of a whole block cannot be called in its middle, nor one that takes more than rows, ids and weights (places in
    a buffer, counts): the marker has no more.
    """
    if each.block is not None:
        return True
    region = each.region
    needed = inspect.signature(getattr(model.get_submodule(region.path), region.method)).parameters.values()
    more = [one for one in needed if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return any(one.name not in (region.x, region.expert, region.weight) for one in more)


def _around(autocast: Autocast, marker: Marker) -> Marker:
    """The marker under what its region runs under; the graph around it runs without."""

    def run(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        with autocast.around():
            return marker(x, chosen, weight)

    return run
