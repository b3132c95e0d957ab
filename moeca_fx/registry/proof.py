"""Prove an entry: its replay gives what the module gives, and every expert has the weight that its route says.

                     small, large, other data, crowded
module.forward(..)   ------------------------------------>  want    difference <= tolerance of the dtype
finish(sum w * e(x)) ------------------------------------>  have    and projected on each expert's part <= 0.4 %
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.discover.calls import Call, changed, crowded
from moeca_fx.discover.inline.block import Marker, largest_difference
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.records import MoERegion
from moeca_fx.discover.reference import tolerance_of
from moeca_fx.discover.scales import ALLOWED, SURE
from moeca_fx.reasons import Reason
from moeca_fx.registry.checked import Checked, Doubled, experts_of, failed, guarded
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
    experts = experts_of(model, owner, entry)
    slots = set()
    worst = 0.0
    for call in (small, large, changed(small), crowded(small)):
        checked = Checked(entry, experts)
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


def _run(entry: Entry, owner: nn.Module, experts: Sequence[nn.Module], marker: Marker, call: Call) -> Any:
    given = guarded(entry, "route", lambda: entry.route(owner, *call.args, **call.kwargs))
    if not isinstance(given, tuple) or len(given) != 3:
        raise failed(entry, "route", f"expected (rows, ids, weights), found {type(given).__name__}")
    routed = marker(*given)
    if entry.finish is None:
        return routed
    finish = entry.finish
    return guarded(entry, "finish", lambda: finish(owner, routed, *call.args, **call.kwargs))


def _difference(entry: Entry, want: Any, have: Any) -> float:
    if pytree.tree_structure(want) != pytree.tree_structure(have):
        found = f"{type(have).__name__}, where the module returns {type(want).__name__}"
        raise failed(entry, "finish", f"expected a result of the module's structure, found {found}")
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
            twice = _flat(_run(entry, owner, experts, Doubled(entry, experts, index), call))
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


def _flat(result: Any) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.double().flatten() for leaf in leaves])


def _dtype(result: Any) -> torch.dtype:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max((leaf.dtype for leaf in leaves), key=lambda dtype: torch.finfo(dtype).eps)
