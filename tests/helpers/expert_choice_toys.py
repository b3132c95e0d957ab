"""Toy layers whose experts choose their tokens, for `tests.helpers.toys.Toy`; no name that the field uses.

`Market` (router, region and a constant expert) takes the place of `Blend`; `Auction.settle` is the region.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.helpers.toys import POOL, TOKENS, WIDTH, Storey, Toy, Wedge

LOTS = 3
"""Tokens that every expert takes of the `TOKENS` of a sample: LOTS * POOL branches a sample, some tokens go without."""
assert LOTS < TOKENS


class Auction(nn.Module):
    """The dispatching module; `settle` is the region. Rows are [B, T, WIDTH], or [B*T, WIDTH] if `flat`."""

    def __init__(self, wedge: Callable[[], nn.Module] = Wedge, pool: int = POOL) -> None:
        super().__init__()
        self.bidders = nn.ModuleList(wedge() for _ in range(pool))

    def settle(self, grains: Tensor, spot: Tensor, price: Tensor) -> Tensor:
        rows = grains.reshape(spot.shape[0], -1, grains.shape[-1])
        total = torch.zeros_like(rows)
        for number, bidder in enumerate(self.bidders):
            where = spot[:, number].unsqueeze(-1).expand(-1, -1, rows.shape[-1])  # [B, C, WIDTH]
            total = total.scatter_add(1, where, bidder(rows.gather(1, where)) * price[:, number].unsqueeze(-1))
        return total.view(grains.shape)

    def forward(self, grains: Tensor, spot: Tensor, price: Tensor) -> Tensor:
        return self.settle(grains, spot, price)


class Market(nn.Module):
    """A layer of expert choice.

    Args:
        constant: an always-active expert, if any.
        flat: hand the region rows [B*T, WIDTH].
        fair: share prices between the experts that chose one token, as Nucleus does.
    """

    def __init__(
        self,
        constant: Callable[[], nn.Module] | None = Wedge,
        flat: bool = False,
        fair: bool = False,
        lots: int = LOTS,
        wedge: Callable[[], nn.Module] = Wedge,
    ) -> None:
        super().__init__()
        self.lots, self.flat, self.fair = lots, flat, fair
        self.compass = nn.Linear(WIDTH, POOL)
        self.auction = Auction(wedge)
        self.constant = constant() if constant is not None else None

    def choose(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """spot [B, E, C], price [B, E, C]."""
        price, spot = self.compass(z).softmax(-1).transpose(1, 2).topk(self.lots, dim=-1)
        if self.fair:
            where = spot.flatten(1)
            sums = z.new_zeros(z.shape[:2]).scatter_add(1, where, price.flatten(1))
            price = 1.5 * price / (sums.gather(1, where).view_as(price) + 1e-12)
        return spot, price

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1]) if self.flat else z
        mixed: Tensor = self.auction(rows, *self.choose(z)).view(z.shape)
        return mixed if self.constant is None else mixed + self.constant(z)


def market_toy(
    first: Callable[[], nn.Module] = Market, rest: Callable[[], nn.Module] = Wedge, height: int = 2, seed: int = 0
) -> Toy:
    """A seeded toy in eval mode: its first storey has the layer `first`, the others `rest` (a dense one)."""
    from tests.helpers.toys import Mixing

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Toy(first, Mixing, 1)
        model.storeys.extend(Storey(rest, Mixing) for _ in range(height - 1))
        return model.eval().requires_grad_(False)
