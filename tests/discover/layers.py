"""MoE layers in forms that discovery must prove, or refuse with the right reason."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.toys import PICKS, POOL, WIDTH, Blend, Quarry, Wedge


def _logged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return wrapper


def _anonymous(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*args)


class Decorated(Quarry):
    """The dispatching method is decorated, twice, by decorators that keep its name."""

    @torch.no_grad()
    @_logged
    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return _loop(self, grains, which, share)


class HiddenByDecorator(Quarry):
    """A decorator hides the dispatching method, so that only its caller `forward` can be seen."""

    @_anonymous
    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return _loop(self, grains, which, share)


def _loop(quarry: Quarry, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
    total = torch.zeros_like(grains)
    for number, stone in enumerate(quarry.stones):
        row, place = torch.where(which == number)
        if row.numel():
            total.index_add_(0, row, stone(grains[row]) * share[row, place, None])
    return total


class ReversedArguments(Quarry):
    """Other argument order, one id a row, weights with an extra axis, and an argument of another kind."""

    def forward(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return self.shape(share.reshape(-1, 1), which.reshape(-1), scale=1.0, grains=grains)

    def shape(self, share: Tensor, which: Tensor, scale: float, grains: Tensor) -> Tensor:
        return scale * _loop(self, grains, which.view(len(grains), -1), share.view(len(grains), -1))


class KeyedQuarry(Quarry):
    """Experts in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.stones = nn.ModuleDict({str(i): Wedge() for i in range(POOL)})  # type: ignore[assignment]

    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        total = torch.zeros_like(grains)
        for number in which.unique().tolist():
            row, place = torch.where(which == number)
            stone = self.stones[str(number)]  # type: ignore[index]
            total.index_add_(0, row, stone(grains[row]) * share[row, place, None])
        return total


class WeightedTwice(Quarry):
    """Applies the routing weights twice."""

    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return super().carve(grains, which, share.square())


class HiddenBias(Quarry):
    """Adds to one expert's output what the expert itself does not hold."""

    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        routed = super().carve(grains, which, share)
        return routed + 0.01 * ((which == 1) * share).sum(-1, keepdim=True)


class ReturnsPair(Quarry):
    """Returns the routed rows and a loss."""

    def forward(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        routed, _ = self.polish(grains, which, share)
        return routed

    def polish(self, grains: Tensor, which: Tensor, share: Tensor) -> tuple[Tensor, float]:
        return _loop(self, grains, which, share), 0.0

    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return _loop(self, grains, which, share)


class OneHotMask(Quarry):
    """Takes a dense [M, E] matrix of weights in place of expert ids."""

    def forward(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return self.weave(grains, torch.zeros(len(grains), POOL).scatter(1, which, share))

    def weave(self, grains: Tensor, dense: Tensor) -> Tensor:
        parts = [stone(grains) * dense[:, i, None] for i, stone in enumerate(self.stones)]
        return torch.stack(parts).sum(0)


class CalledTwice(Blend):
    """Runs its region twice in one forward."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(0.5 * super().forward(z))


class OneFavourite(Blend):
    """Sends every token to the same expert."""

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        which, share = super().choose(rows)
        return torch.zeros_like(which[:, :1]), share[:, :1]


class NeverTheLast(Blend):
    """Never selects the last expert."""

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        share, which = self.compass(rows)[:, : POOL - 1].softmax(-1).topk(self.picks, dim=-1)
        return which, share


class InlineRouting(nn.Module):
    """Routes and loops over its experts in one method."""

    def __init__(self) -> None:
        super().__init__()
        self.compass = nn.Linear(WIDTH, POOL)
        self.stones = nn.ModuleList(Wedge() for _ in range(POOL))

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, WIDTH)
        share, which = self.compass(rows).softmax(-1).topk(PICKS, dim=-1)
        total = torch.zeros_like(rows)
        for number, stone in enumerate(self.stones):
            row, place = torch.where(which == number)
            total = total.index_add(0, row, stone(rows[row]) * share[row, place, None])
        return total.view(z.shape)


class StackedExperts(nn.Module):
    """Experts as rows of three-dimensional parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.compass = nn.Linear(WIDTH, POOL)
        self.first = nn.Parameter(torch.randn(POOL, WIDTH, 8))
        self.second = nn.Parameter(torch.randn(POOL, 8, WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, WIDTH)
        share, which = self.compass(rows).softmax(-1).topk(PICKS, dim=-1)
        out = torch.einsum("mh,ehi,eio->meo", rows, self.first, self.second)
        return (out.gather(1, which[..., None].expand(-1, -1, WIDTH)) * share[..., None]).sum(1).view(z.shape)


class EveryExpert(nn.Module):
    """A plain average of parallel networks: no router."""

    def __init__(self) -> None:
        super().__init__()
        self.stones = nn.ModuleList(Wedge() for _ in range(POOL))

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([stone(z) for stone in self.stones]).mean(0)
