"""Prove an entry: its replay gives what the module gives, and every expert has the weight that its route says.

                     small, large, other data, crowded
module.forward(..)   ------------------------------------>  want    difference <= tolerance of the dtype
finish(sum w * e(x)) ------------------------------------>  have    and projected on each expert's part <= 0.4 %
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.discover.calls import Call, changed, crowded
from moeca_fx.discover.inline.block import Marker, largest_difference, reference_marker
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.records import MoERegion
from moeca_fx.discover.reference import tolerance_of
from moeca_fx.discover.scales import ALLOWED, SURE
from moeca_fx.graph.expert_stack import stacked_view
from moeca_fx.reasons import Reason
from moeca_fx.registry.entry import Entry


@dataclass(frozen=True)
class EntryBlock:
    """Replays a call by an entry; as `moeca_fx.discover.inline.block.Block` does by a recipe."""

    entry: Entry

    @property
    def free(self) -> tuple[int, ...]:
        """Ids of experts without parameters: none."""
        return ()

    def run(
        self, owner: nn.Module, experts: Sequence[nn.Module], marker: Marker, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """The call's result, the experts computed by `marker` (rows, ids or tokens, weights)."""
        rows, ids, weights = self.entry.route(owner, *args, **kwargs)
        routed = marker(rows, ids, weights)
        return routed if self.entry.finish is None else self.entry.finish(owner, routed, *args, **kwargs)


def prove_entry(model: nn.Module, path: str, entry: Entry, small: Call, large: Call) -> MoERegion:
    """The region of the module at `path`.

    Args:
        model: in eval mode.
        path: of a module that the entry matches.
        entry: what it computes.
        small, large: its calls in two runs of the model, of different batch sizes.

    Raises:
        NotReplayable: the entry is wrong, or cannot be run.
    """
    owner = model.get_submodule(path)
    experts = _experts(model, owner, entry)
    slots = set()
    worst = 0.0
    for call in (small, large, changed(small), crowded(small)):
        checked = _Checked(entry, experts)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            want = getattr(owner, entry.region)(*call.args, **call.kwargs)
            have = _run(entry, owner, experts, checked, call)
        worst = max(worst, _difference(entry, want, have))
        slots.add(checked.slots)
        limit = _limit(want)
        if not worst <= limit:
            whose = "; ".join(_off(entry, owner, experts, call, want, have))
            raise NotReplayable(
                f"entry {entry.name!r}: its result differs from {path}.{entry.region} by {worst:.1e} relative (allowed "
                f"{limit:.0e})" + (f"; {whose}" if whose else ""),
                Reason.ENTRY_UNPROVEN,
            )
        if call is small and (off := _off(entry, owner, experts, call, want, have)):
            raise NotReplayable(f"entry {entry.name!r}: {'; '.join(off)}", Reason.ENTRY_UNPROVEN)
    if len(slots) != 1:
        raise NotReplayable(
            f"entry {entry.name!r}: its route gives {sorted(slots)} slots for different inputs; expected one number",
            Reason.ENTRY_FAILED,
        )
    places = {id(module): name for name, module in model.named_modules()}
    return MoERegion(
        path=path,
        method=entry.region,
        block=path,
        experts=tuple(places.get(id(expert), f"{path}.{index}") for index, expert in enumerate(experts)),
        top_k=slots.pop(),
        x="",
        expert="",
        weight="",
        error=worst,
        inline=True,
        container=path,
        layout=entry.layout,
        empty_slots=entry.empty_slots,
        entry=entry,
    )


def _experts(model: nn.Module, owner: nn.Module, entry: Entry) -> list[nn.Module]:
    experts: list[nn.Module] = _guarded(entry, "experts", lambda: list(entry.experts(owner)))
    if len(experts) < 2 or not all(isinstance(expert, nn.Module) for expert in experts):
        kinds = sorted({type(expert).__name__ for expert in experts}) or ["nothing"]
        raise _failed(entry, "experts", f"expected at least two modules, found {len(experts)} of {', '.join(kinds)}")
    shapes = [{name: value.shape for name, value in expert.named_parameters()} for expert in experts]
    if not shapes[0] or any(other != shapes[0] for other in shapes):
        raise _failed(entry, "experts", "expected parameters of the same names and shapes in every expert")
    own = {id(parameter) for parameter in model.parameters()}
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name in shapes[0]:
        parts = [expert.get_parameter(name) for expert in experts]
        shared = all(part.untyped_storage().data_ptr() in held for part in parts)
        if not shared or (not all(id(part) in own for part in parts) and stacked_view(parts) is None):
            raise _failed(
                entry,
                "experts",
                f"expected parameter {name!r} to be the model's own, or consecutive slices of one of its parameters, "
                "found a copy or another view; use moeca_fx.registry.slices",
            )
    return experts


class _Checked:
    """The reference marker, which also checks what the route gives and keeps it."""

    def __init__(self, entry: Entry, experts: Sequence[nn.Module]) -> None:
        self.entry, self.count = entry, len(experts)
        self.reference = reference_marker(experts, (), entry.layout == "expert")
        self.slots = 0

    def __call__(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed sum in the shape of the rows."""
        self._check(rows, ids, weights)
        routed: Tensor = _guarded(self.entry, "experts", lambda: self.reference(rows, ids, weights))
        return routed

    def _check(self, rows: Tensor, ids: Tensor, weights: Tensor) -> None:
        tensors = all(isinstance(value, Tensor) for value in (rows, ids, weights))
        if not tensors or ids.dtype != torch.int64 or not rows.is_floating_point() or rows.dim() < 2:
            raise _failed(self.entry, "route", "expected rows [.., H], int64 ids and weights")
        if ids.shape != weights.shape or not weights.is_floating_point():
            found = f"{tuple(ids.shape)} and {tuple(weights.shape)} {weights.dtype}"
            raise _failed(self.entry, "route", f"expected ids and floating-point weights of one shape, found {found}")
        tokens = rows.numel() // rows.shape[-1]
        by_expert = self.entry.layout == "expert"
        fits = ids.dim() == 3 and ids.shape[1] == self.count if by_expert else ids.numel() % tokens == 0
        if not fits:
            wanted = f"[B, {self.count}, C]" if by_expert else f"k for each of {tokens} rows"
            raise _failed(self.entry, "route", f"expected ids {wanted}, found {tuple(ids.shape)}")
        most = tokens // ids.shape[0] if by_expert else self.count + self.entry.empty_slots
        if not bool(((ids >= 0) & (ids < most)).all()):
            found = f"{int(ids.min())} to {int(ids.max())}"
            raise _failed(self.entry, "route", f"expected ids below {most}, found {found} (E, for none: empty_slots)")
        self.slots = ids.shape[-1] if by_expert else ids.numel() // tokens


def _run(entry: Entry, owner: nn.Module, experts: Sequence[nn.Module], marker: Marker, call: Call) -> Any:
    given = _guarded(entry, "route", lambda: entry.route(owner, *call.args, **call.kwargs))
    if not isinstance(given, tuple) or len(given) != 3:
        raise _failed(entry, "route", f"expected (rows, ids, weights), found {type(given).__name__}")
    routed = marker(*given)
    if entry.finish is None:
        return routed
    finish = entry.finish
    return _guarded(entry, "finish", lambda: finish(owner, routed, *call.args, **call.kwargs))


def _difference(entry: Entry, want: Any, have: Any) -> float:
    if pytree.tree_structure(want) != pytree.tree_structure(have):
        found = f"{type(have).__name__}, where the module returns {type(want).__name__}"
        raise _failed(entry, "finish", f"expected a result of the module's structure, found {found}")
    try:
        return largest_difference(want, have)
    except NotReplayable as reason:
        raise NotReplayable(f"entry {entry.name!r}: {reason}", Reason.ENTRY_UNPROVEN) from reason


def _limit(result: Any) -> float:
    floats = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return min((tolerance_of(leaf.dtype) for leaf in floats), default=0.0)


def _off(entry: Entry, owner: nn.Module, experts: Sequence[nn.Module], call: Call, want: Any, have: Any) -> list[str]:
    """A line for every expert whose part of the result is another than the route says; none when all are off.

    The result is taken for linear in the routed sum near it: each expert's part is what doubling its weights adds.
    """
    first, second = _flat(want), _flat(have)
    lines = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for index in range(len(experts)):
            twice = _flat(_run(entry, owner, experts, _Doubled(entry, experts, index), call))
            part = twice - second
            size = float(part.square().sum())
            if not size > 0:
                continue
            off = float(((first - second) * part).sum()) / size
            step = torch.finfo(_dtype(want)).eps / 12**0.5
            noise = step * float((first * part).norm()) / size
            if abs(off) > ALLOWED + SURE * noise:
                lines.append(f"expert {index} enters the sum with {1 + off:.4f} times its routing weight")
    return lines if len(lines) < len(experts) else []


class _Doubled(_Checked):
    """The reference with the weights of one expert doubled."""

    def __init__(self, entry: Entry, experts: Sequence[nn.Module], index: int) -> None:
        super().__init__(entry, experts)
        self.index = index

    def __call__(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed sum in the shape of the rows."""
        if self.entry.layout == "expert":
            numbers = torch.arange(self.count, device=ids.device).view(1, -1, 1)
            return self.reference(rows, ids, torch.where(numbers == self.index, 2 * weights, weights))
        return self.reference(rows, ids, torch.where(ids == self.index, 2 * weights, weights))


def _flat(result: Any) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.double().flatten() for leaf in leaves])


def _dtype(result: Any) -> torch.dtype:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max((leaf.dtype for leaf in leaves), key=lambda dtype: torch.finfo(dtype).eps)


def _guarded(entry: Entry, name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except NotReplayable:
        raise
    except Exception as error:  # the entry is the user's code, which may raise anything
        raise _failed(entry, name, f"raised {type(error).__name__}: {error}") from error


def _failed(entry: Entry, name: str, problem: str) -> NotReplayable:
    return NotReplayable(f"entry {entry.name!r}: {name}: {problem}", Reason.ENTRY_FAILED)
