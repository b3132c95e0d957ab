"""A layer that discovery refuses, since its stacked experts compute what no known form does, and entries for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.registry import Entry, slices
from tests.helpers.toys import PICKS, POOL, WIDTH, Wedge

INNER = 8


class Odd(nn.Module):
    """Three matrices an expert, with a scale of its own and a sine inside, beside a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.compass = nn.Linear(WIDTH, POOL)
        self.first = nn.Parameter(torch.randn(POOL, WIDTH, INNER) / 4)
        self.second = nn.Parameter(torch.randn(POOL, WIDTH, INNER) / 4)
        self.third = nn.Parameter(torch.randn(POOL, INNER, WIDTH) / 3)
        self.pitch = nn.Parameter(0.5 + torch.rand(POOL))
        self.constant = Wedge()

    def routed(self, rows: Tensor) -> Tensor:
        """The routed sum."""
        share, which = self.compass(rows).softmax(-1).topk(PICKS, dim=-1)
        inner = torch.sin(torch.einsum("mh,ehi->mei", rows, self.first)) * self.pitch[:, None]
        inner = inner * torch.einsum("mh,ehi->mei", rows, self.second)
        every = torch.einsum("mei,eio->meo", inner, self.third)
        return (every.gather(1, which[..., None].expand(-1, -1, WIDTH)) * share[..., None]).sum(1)

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, WIDTH)
        mixed = self.routed(rows).view(z.shape)
        out: Tensor = mixed + self.constant(z)
        return out


def route(layer: Odd, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids, weights of `Odd.forward`."""
    rows = z.reshape(-1, WIDTH)
    share, which = layer.compass(rows).softmax(-1).topk(PICKS, dim=-1)
    return rows, which, share


def compute(x: Tensor, first: Tensor, second: Tensor, third: Tensor, pitch: Tensor) -> Tensor:
    """One expert of `Odd`."""
    return (torch.sin(x @ first) * pitch * (x @ second)) @ third


def experts(layer: Odd) -> list[nn.Module]:
    """All experts of `Odd`."""
    return slices(layer, ("first", "second", "third", "pitch"), compute)


def finish(layer: Odd, routed: Tensor, z: Tensor) -> Tensor:
    """What `Odd.forward` makes of the sum."""
    out: Tensor = routed.view(z.shape) + layer.constant(z)
    return out


ENTRY = Entry(name="odd", match=Odd, route=route, experts=experts, finish=finish)


def one_expert_off(factor: float) -> Entry:
    """An entry that takes expert 2 for `factor` of what it is."""

    def off(layer: Odd, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, which, share = route(layer, z)
        return rows, which, torch.where(which == 2, share * factor, share)

    return replace(ENTRY, route=off)


def with_(**changes: Callable[..., Any] | Any) -> Entry:
    """`ENTRY` with other fields."""
    return replace(ENTRY, **changes)
