"""What an entry gives, held to its form: experts, rows, ids and weights; whatever its code raises becomes a refusal.

route(owner, x)  ->  rows [.., H], ids [.., k] int64 below E, weights [.., k]      else: expected .., found ..
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.discover.inline.block import reference_marker
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.graph.expert_stack import stacked_view
from moeca_fx.reasons import Reason
from moeca_fx.registry.entry import Entry


def experts_of(model: nn.Module, owner: nn.Module, entry: Entry) -> list[nn.Module]:
    """An entry's experts for the module `owner` of `model`.

    Raises:
        NotReplayable: they are not alike, not of the model's own parameters, or fewer than two.
    """
    experts: list[nn.Module] = guarded(entry, "experts", lambda: list(entry.experts(owner)))
    if len(experts) < 2 or not all(isinstance(expert, nn.Module) for expert in experts):
        kinds = sorted({type(expert).__name__ for expert in experts}) or ["nothing"]
        raise failed(entry, "experts", f"expected at least two modules, found {len(experts)} of {', '.join(kinds)}")
    shapes = [{name: value.shape for name, value in expert.named_parameters()} for expert in experts]
    if not shapes[0] or any(other != shapes[0] for other in shapes):
        raise failed(entry, "experts", "expected parameters of the same names and shapes in every expert")
    own = {id(parameter) for parameter in model.parameters()}
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name in shapes[0]:
        parts = [expert.get_parameter(name) for expert in experts]
        shared = all(part.untyped_storage().data_ptr() in held for part in parts)
        if not shared or (not all(id(part) in own for part in parts) and stacked_view(parts) is None):
            raise failed(
                entry,
                "experts",
                f"expected parameter {name!r} to be the model's own, or consecutive slices of one of its parameters, "
                "found a copy or another view; use moeca_fx.registry.slices",
            )
    return experts


class Checked:
    """The reference marker, which also checks what the route gives and keeps it."""

    def __init__(self, entry: Entry, experts: Sequence[nn.Module]) -> None:
        self.entry, self.count = entry, len(experts)
        self.reference = reference_marker(experts, (), entry.layout == "expert")
        self.slots = 0

    def __call__(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed sum in the shape of the rows."""
        self._check(rows, ids, weights)
        routed: Tensor = guarded(self.entry, "experts", lambda: self.reference(rows, ids, weights))
        return routed

    def _check(self, rows: Tensor, ids: Tensor, weights: Tensor) -> None:
        tensors = all(isinstance(value, Tensor) for value in (rows, ids, weights))
        if not tensors or ids.dtype != torch.int64 or not rows.is_floating_point() or rows.dim() < 2:
            raise failed(self.entry, "route", "expected rows [.., H], int64 ids and weights")
        if ids.shape != weights.shape or not weights.is_floating_point():
            found = f"{tuple(ids.shape)} and {tuple(weights.shape)} {weights.dtype}"
            raise failed(self.entry, "route", f"expected ids and floating-point weights of one shape, found {found}")
        tokens = rows.numel() // rows.shape[-1]
        by_expert = self.entry.layout == "expert"
        fits = ids.dim() == 3 and ids.shape[1] == self.count if by_expert else ids.numel() % tokens == 0
        if not fits:
            wanted = f"[B, {self.count}, C]" if by_expert else f"k for each of {tokens} rows"
            raise failed(self.entry, "route", f"expected ids {wanted}, found {tuple(ids.shape)}")
        most = tokens // ids.shape[0] if by_expert else self.count + self.entry.empty_slots
        if not bool(((ids >= 0) & (ids < most)).all()):
            found = f"{int(ids.min())} to {int(ids.max())}"
            raise failed(self.entry, "route", f"expected ids below {most}, found {found} (E, for none: empty_slots)")
        self.slots = ids.shape[-1] if by_expert else ids.numel() // tokens


class Doubled(Checked):
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


def guarded(entry: Entry, name: str, function: Callable[[], Any]) -> Any:
    """What a part of an entry, here `function`, returns; what it raises becomes `NotReplayable`."""
    try:
        return function()
    except NotReplayable:
        raise
    except Exception as error:  # the entry is the user's code, which may raise anything
        raise failed(entry, name, f"raised {type(error).__name__}: {error}") from error


def failed(entry: Entry, name: str, problem: str) -> NotReplayable:
    """The refusal of an entry for its part `name`."""
    return NotReplayable(f"entry {entry.name!r}: {name}: {problem}", Reason.ENTRY_FAILED)
