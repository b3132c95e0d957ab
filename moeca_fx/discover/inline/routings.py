"""Every way of routing that the values of a tape allow, each as the weight of every expert for a few tokens.

expert ids [N, k] and weights [N, k]                     chosen by tokens; ids from E on stand for no expert
ids, weights and places [N, k] below a limit             the same with branches dropped beyond a capacity
weights [N, E], or [N, E, C] summed over C               zero where an expert is not chosen
tokens [B, E, C] and weights                             chosen by experts
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from moeca_fx.discover.inline.tape import Ref, Tape

aten = torch.ops.aten
Kind = Literal["ids", "dense", "choice"]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_LIMITS = 40  # capacities that are tried


@dataclass(frozen=True)
class Routing:
    """Values of the tape that say which expert takes which token, and with which weight.

    Attributes:
        kind: ``ids`` (expert of each branch, k a token), ``dense`` (a weight for every token and expert) or ``choice``
            (token of each branch, C an expert of a sample).
        expert: value of the expert ids, or of the chosen tokens; None for ``dense``.
        weight: value of the weights.
        slots: k, or C; for ``dense`` the most experts that a token can have.
        place: value whose entries below `limit` mark the branches that are kept; None when all are.
        reduced: whether dense weights have a last axis to sum over (places in a capacity buffer).
        expert_first: whether weights of ``choice`` run over experts before samples.
        columns: columns of dense weights; those beyond the experts stand for none.
        beyond: what ids beyond the experts compute: nothing, or their input.
    """

    kind: Kind
    expert: int | None
    weight: int
    slots: int
    place: int | None = None
    limit: int = 0
    reduced: bool = False
    expert_first: bool = False
    columns: int = 0
    beyond: Literal["none", "zero", "identity"] = "none"

    @property
    def values(self) -> tuple[int, ...]:
        """The values of the tape, as the branches take them."""
        return tuple(number for number in (self.weight, self.expert, self.place) if number is not None)


@dataclass(frozen=True)
class Shares:
    """Routings and the weights that they give.

    Attributes:
        routings: one a row of `weights`.
        weights: [R, J, E + 1] fp64 on the sampled tokens; the last column is the weight of ids beyond the experts.
        possible: whether any values have the form of a routing, even one that gives the sampled tokens no expert.
    """

    routings: list[Routing]
    weights: Tensor
    possible: bool = True


def find_routings(
    tape: Tape, before: Mapping[int, Tensor], count: int, tokens: int, samples: int, chosen: Tensor, dropped: bool
) -> Shares:
    """Routings of `tokens` token rows over `count` experts.

    Args:
        tape: of the block.
        before: its values that do not depend on the experts, by number.
        count: E.
        tokens: N.
        samples: B.
        chosen: numbers of the sampled tokens [J].
        dropped: only those with dropped branches, else only those without.
    """
    values = {n: v for n, v in before.items() if v.numel() > 1 and v.dim() and not v.is_inference()}
    whole = {n: v for n, v in values.items() if v.dtype in _INTEGERS}
    floats = {n: v for n, v in values.items() if v.is_floating_point()}
    if dropped:
        found = list(_dropped(whole, floats, count, tokens, chosen))
    else:
        found = [
            *_by_ids(whole, floats, count, tokens, chosen),
            *_choice(whole, floats, count, tokens, samples, chosen),
            *_dense(tape, floats, count, tokens, chosen),
        ]
    kept: dict[bytes, tuple[Routing, Tensor]] = {}
    for routing, share in found:
        if bool(torch.isfinite(share).all()) and bool((share[:, :count] != 0).any()):
            kept.setdefault(share.numpy().tobytes(), (routing, share))
    if not kept:
        return Shares([], torch.zeros(0, len(chosen), count + 1, dtype=torch.float64), bool(found))
    return Shares([routing for routing, _ in kept.values()], torch.stack([share for _, share in kept.values()]))


def _ids(whole: Mapping[int, Tensor], count: int, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """Values that may be expert ids, as [N, k]."""
    for number, ids in whole.items():
        slots = ids.numel() // tokens
        if ids.numel() % tokens or slots > 2 * count or int(ids.min()) < 0 or int(ids.max()) > 2 * count:
            continue
        if bool((ids < count).any()):
            yield number, ids.reshape(tokens, slots)


def _spread(ids: Tensor, weight: Tensor, count: int) -> Tensor | None:
    """Ids and weights [J, k] as weights [J, E + 1]; None when an expert occurs twice."""
    own = ids.clamp(max=count)
    times = torch.zeros(len(ids), count + 1).scatter_add_(1, own, torch.ones(own.shape))
    if bool((times[:, :count] > 1).any()):
        return None
    return torch.zeros(len(ids), count + 1, dtype=torch.float64).scatter_add_(1, own, weight.double())


def _by_ids(
    whole: Mapping[int, Tensor], floats: Mapping[int, Tensor], count: int, tokens: int, chosen: Tensor
) -> Iterator[tuple[Routing, Tensor]]:
    for number, ids in _ids(whole, count, tokens):
        beyond = bool((ids >= count).any())
        for other, weight in floats.items():
            if weight.numel() == ids.numel():
                share = _spread(ids[chosen], weight.reshape(ids.shape)[chosen], count)
                for kind in ("zero", "identity") if beyond else ("none",):
                    if share is not None:
                        yield Routing("ids", number, other, ids.shape[1], beyond=kind), _with(share, kind)


def _with(share: Tensor, beyond: str) -> Tensor:
    return share if beyond == "identity" else torch.cat([share[:, :-1], torch.zeros_like(share[:, -1:])], 1)


def _dropped(
    whole: Mapping[int, Tensor], floats: Mapping[int, Tensor], count: int, tokens: int, chosen: Tensor
) -> Iterator[tuple[Routing, Tensor]]:
    for (number, ids), (where, place) in product(list(_ids(whole, count, tokens)), whole.items()):
        if where == number or place.numel() != ids.numel() or int(place.max()) < 1:
            continue
        places = place.reshape(ids.shape)
        for limit in sorted({int(v) for v in places.flatten().tolist() if v > 0})[:_LIMITS]:
            kept = places < limit
            for other, weight in floats.items():
                if weight.numel() == ids.numel():
                    share = torch.where(kept, weight.reshape(ids.shape), 0)[chosen]
                    spread = _spread(ids[chosen], share, count)
                    if spread is not None:
                        routing = Routing("ids", number, other, ids.shape[1], place=where, limit=limit)
                        yield routing, _with(spread, "none")


def _dense(
    tape: Tape, floats: Mapping[int, Tensor], count: int, tokens: int, chosen: Tensor
) -> Iterator[tuple[Routing, Tensor]]:
    for number, weight in floats.items():
        for reduced in (False, True):
            if weight.dim() < 2 + reduced:
                continue
            columns = weight.shape[-1 - reduced]
            if not count <= columns <= 2 * count or weight.numel() != tokens * columns * weight.shape[-1] ** reduced:
                continue
            dense = weight.sum(-1) if reduced else weight
            share = dense.reshape(tokens, columns)
            bound = _most_chosen(tape, number, share)
            beyond = share[chosen, count:].double().sum(-1, keepdim=True)
            spread = torch.cat([share[chosen, :count].double(), beyond], 1)
            for kind in ("zero", "identity") if columns > count else ("none",):
                routing = Routing("dense", None, number, bound, reduced=reduced, columns=columns, beyond=kind)
                yield routing, _with(spread, kind)


def _choice(
    whole: Mapping[int, Tensor],
    floats: Mapping[int, Tensor],
    count: int,
    tokens: int,
    samples: int,
    chosen: Tensor,
) -> Iterator[tuple[Routing, Tensor]]:
    each, left = divmod(tokens, samples)
    if left:
        return  # rows that do not belong to samples
    for number, token in whole.items():
        if token.dim() != 3 or token.shape[:2] != (samples, count) or int(token.min()) < 0 or int(token.max()) >= each:
            continue
        for other, weight in floats.items():
            if weight.numel() != token.numel():
                continue
            for expert_first in (False, True):
                shape = (count, samples, -1) if expert_first else (samples, count, -1)
                share = weight.reshape(shape).transpose(0, 1) if expert_first else weight.reshape(shape)
                dense = torch.zeros(samples, count + 1, each, dtype=torch.float64)
                dense[:, :count].scatter_add_(-1, token, share.double())
                flat = dense.transpose(1, 2).reshape(tokens, count + 1)
                routing = Routing("choice", number, other, token.shape[-1], expert_first=expert_first)
                yield routing, flat[chosen]


def _most_chosen(tape: Tape, weight: int, dense: Tensor) -> int:
    """How many experts a token can have: k of a top-k over all experts that the weights follow from; E without one."""
    count = dense.shape[-1]
    found = int((dense != 0).sum(-1).max())
    makers = {number: entry for entry in tape.entries for number in entry.outputs if number is not None}
    stack, seen, bounds = [weight], set(), []
    while stack:
        number = stack.pop()
        if number in seen or number not in makers:
            continue
        seen.add(number)
        entry = makers[number]
        stack += entry.reads()
        source = entry.args[0] if entry.args else None
        value = tape.values.get(source.number) if isinstance(source, Ref) else None
        if value is not None and value.dim() and value.shape[-1] == count:
            if entry.target is aten.topk.default:
                bounds.append(int(entry.args[1]))
            elif entry.target in (aten.argmax.default, aten.max.dim):
                bounds.append(1)
    fitting = [bound for bound in bounds if bound >= found]
    return max(fitting) if fitting else count
