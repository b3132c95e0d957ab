"""One model of each kind that discovery proves: a dispatching method, a block with its router inside, stacked experts.

`Method(boost=1.01)` and the like plant a fault: the output of one expert is scaled in the dispatch, where no weight
shows it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.toys import PICKS, POOL, WIDTH, Blend, Quarry, Toy, toy

Kind = Literal["method", "block", "stacked"]
KINDS: tuple[Kind, ...] = ("method", "block", "stacked")
FAULTY = 1  # the expert that is boosted


def dispatched(
    experts: Sequence[Callable[[Tensor], Tensor]], rows: Tensor, which: Tensor, share: Tensor, boost: float
) -> Tensor:
    """``sum_k share_k * expert_k(row)``, one expert boosted."""
    total = torch.zeros_like(rows)
    for number, expert in enumerate(experts):
        row, place = torch.where(which == number)
        if row.numel():
            part = expert(rows[row]) * share[row, place, None]
            part = part if number != FAULTY or boost == 1 else part * boost
            total = total.index_add(0, row, part.to(total.dtype))  # under autocast the two differ
    return total


class MethodQuarry(Quarry):
    def __init__(self, boost: float = 1.0) -> None:
        super().__init__()
        self.boost = boost

    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return dispatched(list(self.stones), grains, which, share, self.boost)


class Method(Blend):
    """The dispatch is a method of its own."""

    def __init__(self, boost: float = 1.0) -> None:
        super().__init__(partial(MethodQuarry, boost))


class InOneBlock(Blend):
    """Router and dispatch in one forward, experts as modules."""

    def __init__(self, boost: float = 1.0) -> None:
        super().__init__()
        self.boost = boost

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, WIDTH)
        which, share = self.choose(rows)
        mixed = dispatched(list(self.quarry.stones), rows, which, share, self.boost).view(z.shape)
        return mixed + self.constant(z)


class Stacked(nn.Module):
    """Experts as rows of three-dimensional parameters."""

    def __init__(self, boost: float = 1.0) -> None:
        super().__init__()
        self.boost = boost
        self.compass = nn.Linear(WIDTH, POOL)
        self.first = nn.Parameter(torch.randn(POOL, WIDTH, 16) * WIDTH**-0.5)
        self.second = nn.Parameter(torch.randn(POOL, 8, WIDTH) * 8**-0.5)

    def one(self, number: int, rows: Tensor) -> Tensor:
        gate, up = (rows @ self.first[number]).chunk(2, dim=-1)
        return (functional.silu(gate) * up) @ self.second[number]

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, WIDTH)
        share, which = self.compass(rows).softmax(-1).topk(PICKS, dim=-1)
        experts = [partial(self.one, number) for number in range(POOL)]
        return dispatched(experts, rows, which, share, self.boost).view(z.shape)


LAYERS: dict[Kind, Callable[[float], nn.Module]] = {"method": Method, "block": InOneBlock, "stacked": Stacked}


def model_of(kind: Kind, dtype: torch.dtype = torch.float32, boost: float = 1.0, height: int = 1, seed: int = 0) -> Toy:
    """A toy of a kind, in eval mode."""
    return toy(partial(LAYERS[kind], boost), height=height, seed=seed).to(dtype)


def inputs_of(
    dtype: torch.dtype = torch.float32, batch: int = 3, tokens: int = 6, seed: int = 0, clock: float = 0.1
) -> tuple[Tensor, Tensor]:
    """grid [B, T, WIDTH], clock [B]."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(batch, tokens, WIDTH, generator=generator)
    return grid.to(dtype), torch.full((batch,), clock, dtype=dtype)
