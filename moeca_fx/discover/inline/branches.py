"""From the routing that a block computes to branches: expert ids and weights a token, or tokens and weights an expert.

ids [N, k], weights                  ids, weights
dense [N, E]                  -->    topk(|dense|, k): ids and weights, id E where the weight is zero
experts 2 and 3 are identity         their ids become E, their weights sums over the slots that had them
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_fx.discover.inline.match import Routing


@dataclass(frozen=True)
class Branches:
    """What the marker takes.

    Attributes:
        chosen: expert ids [.., k], E for none; or chosen tokens [B, E, C].
        weight: routing weights of the same shape.
        free: (id, weight [.., 1] of each token) of experts without parameters.
    """

    chosen: Tensor
    weight: Tensor
    free: tuple[tuple[int, Tensor], ...] = ()


def branches_of(
    routing: Routing, x: Tensor, weight: Tensor, chosen: Sequence[Tensor], free: Sequence[int], count: int
) -> Branches:
    """The branches of a block's call.

    Args:
        routing: how the values are laid out.
        x: token rows [.., H].
        weight: value of the weights.
        chosen: value of expert ids or tokens; empty for dense weights.
        free: ids of experts without parameters.
        count: number of all experts.
    """
    if routing.kind == "choice":
        token = chosen[0]
        samples, experts, slots = token.shape
        if routing.expert_first:
            return Branches(token, weight.reshape(experts, samples, slots).transpose(0, 1))
        return Branches(token, weight.reshape(samples, experts, slots))
    if routing.kind == "ids":
        shape = (*x.shape[:-1], routing.slots)
        return _without_free(chosen[0].reshape(shape), weight.reshape(shape), free, count)
    dense = (weight.sum(-1) if routing.reduced else weight).reshape(*x.shape[:-1], count)
    shares = tuple((index, dense[..., index : index + 1]) for index in free)
    real = [index for index in range(count) if index not in free]
    if free:
        dense = torch.cat([dense[..., index : index + 1] for index in real], -1)
    slots = min(routing.slots, len(real))
    expert = dense.abs().topk(slots, -1).indices
    share = dense.gather(-1, expert)
    return Branches(torch.where(share == 0, len(real), expert), share, shares)


def _without_free(expert: Tensor, weight: Tensor, free: Sequence[int], count: int) -> Branches:
    """Ids over the experts with parameters only."""
    if not free:
        return Branches(expert, weight)
    shares = []
    own, before = expert, torch.zeros_like(expert, dtype=torch.bool)
    for index in free:
        here = expert == index
        shares.append((index, torch.where(here, weight, 0).sum(-1, keepdim=True)))
        own, before = own - (expert > index).to(own.dtype), before | here
    none = count - len(free)
    return Branches(torch.where(before, none, own), torch.where(before, 0, weight), tuple(shares))
