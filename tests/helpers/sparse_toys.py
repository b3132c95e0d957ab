"""Toy layers in which a token may have fewer experts than slots, for `tests.helpers.toys.Toy`.

An id of POOL is no expert. `Thrifty` keeps what is over a threshold and within an expert's capacity; what it drops is
different at every step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.helpers.toys import POOL, WIDTH, Quarry, Wedge

MOST = 3
"""Slots of a token."""


class Careful(Quarry):
    """`carve` skips ids that are no stone; the weights there are garbage, as a model may leave them."""

    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        total = torch.zeros_like(grains)
        for number, stone in enumerate(self.stones):
            row, place = torch.where(which == number)
            total = total.index_add(0, row, stone(grains[row]) * share[row, place, None])
        return total


class Thrifty(nn.Module):
    """A layer of threshold routing.

    Args:
        floor: softmax score below which an expert is not asked; 0 leaves no slot empty, 2 all of them.
    """

    def __init__(
        self, floor: float = 0.24, constant: Callable[[], nn.Module] | None = Wedge, flat: bool = True
    ) -> None:
        super().__init__()
        self.floor = floor
        self.compass = nn.Linear(WIDTH, POOL)
        self.quarry = Careful()
        self.constant = constant() if constant is not None else None

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        share, which = (self.compass(rows) * 1.5).softmax(-1).topk(MOST, dim=-1)
        return torch.where(share < self.floor, POOL, which), share

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        mixed: Tensor = self.quarry(rows, *self.choose(rows)).view(z.shape)
        return mixed if self.constant is None else mixed + self.constant(z)
