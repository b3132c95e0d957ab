"""From the routing that a block computes to branches: expert ids and weights a token, or tokens and weights an expert.

ids [N, k], weights                  ids, weights
places at or above the capacity      their ids become E, their weights zero
dense [N, E]                  -->    topk(|dense|, k): ids and weights, id E where the weight is zero
experts 2 and 3 are identity         their ids become E, their weights sums over the slots that had them
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_fx.discover.inline.routings import Routing

COPY = -1  # id that stands for what ids beyond the experts compute


@dataclass(frozen=True)
class Branches:
    """What the marker takes.

    Attributes:
        chosen: expert ids [.., k], E for none; or chosen tokens [B, E, C].
        weight: routing weights of the same shape.
        free: (id, weight [.., 1] of each token) of experts without parameters; `COPY` is an input passed on.
    """

    chosen: Tensor
    weight: Tensor
    free: tuple[tuple[int, Tensor], ...] = ()


def branches_of(routing: Routing, x: Tensor, values: Sequence[Tensor], free: Sequence[int], count: int) -> Branches:
    """The branches of a block's call.

    Args:
        routing: how the values are laid out.
        x: token rows [.., H].
        values: of `routing.values`.
        free: ids of experts without parameters.
        count: number of experts, those too.
    """
    weight = values[0]
    if routing.kind == "choice":
        token = values[1]
        samples, experts, slots = token.shape
        if routing.expert_first:
            return Branches(token, weight.reshape(experts, samples, slots).transpose(0, 1))
        return Branches(token, weight.reshape(samples, experts, slots))
    if routing.kind == "dense":
        return _from_dense(routing, x, weight, free, count)
    shape = (*x.shape[:-1], routing.slots)
    expert, weight = values[1].reshape(shape), weight.reshape(shape)
    if routing.place is not None:
        kept = values[2].reshape(shape) < routing.limit
        expert, weight = torch.where(kept, expert, count), torch.where(kept, weight, 0)
    return _without_free(routing, expert, weight, free, count)


def may_be_empty(routing: Routing, free: Sequence[int]) -> bool:
    """Whether a token may have fewer branches than slots."""
    return bool(free) or routing.kind == "dense" or routing.place is not None or routing.beyond != "none"


def _from_dense(routing: Routing, x: Tensor, weight: Tensor, free: Sequence[int], count: int) -> Branches:
    dense = (weight.sum(-1) if routing.reduced else weight).reshape(*x.shape[:-1], routing.columns)
    shares = [(index, dense[..., index : index + 1]) for index in free]
    if routing.beyond == "identity":
        shares.append((COPY, dense[..., count:].sum(-1, keepdim=True)))
    real = [index for index in range(count) if index not in free]
    if len(real) < routing.columns:
        dense = torch.cat([dense[..., index : index + 1] for index in real], -1)
    expert = dense.abs().topk(min(routing.slots, len(real)), -1).indices
    share = dense.gather(-1, expert)
    return Branches(torch.where(share == 0, len(real), expert), share, tuple(shares))


def _without_free(routing: Routing, expert: Tensor, weight: Tensor, free: Sequence[int], count: int) -> Branches:
    """Ids over the experts with parameters only."""
    if not may_be_empty(routing, free):
        return Branches(expert, weight)
    none = expert >= count
    shares = []
    if routing.beyond == "identity":
        shares.append((COPY, torch.where(none, weight, 0).sum(-1, keepdim=True)))
    own = expert
    for index in free:
        here = expert == index
        shares.append((index, torch.where(here, weight, 0).sum(-1, keepdim=True)))
        own, none = own - (expert > index).to(own.dtype), none | here
    return Branches(torch.where(none, count - len(free), own), torch.where(none, 0, weight), tuple(shares))
