"""A toy denoiser in which no class or attribute has a name the field uses, and every part can be swapped.

`Toy(layer=..., mixing=..., mlp=...)` with the variants below makes the models that tests need: other attention,
other experts, broken layers. Inputs come from `toy_inputs`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, TOKENS, HEADS, POOL, PICKS = 16, 6, 2, 4, 2


class Wedge(nn.Module):
    """An expert: gated, without biases."""

    def __init__(self, width: int = WIDTH, inner: int = 8) -> None:
        super().__init__()
        self.a = nn.Linear(width, inner, bias=False)
        self.b = nn.Linear(width, inner, bias=False)
        self.c = nn.Linear(inner, width, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.c(functional.silu(self.a(z)) * self.b(z))
        return out


class Quarry(nn.Module):
    """The dispatching module; `carve` is the region."""

    def __init__(self, wedge: Callable[[], nn.Module] = Wedge, pool: int = POOL) -> None:
        super().__init__()
        self.stones = nn.ModuleList(wedge() for _ in range(pool))

    def carve(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        total = torch.zeros_like(grains)
        for number in which.unique().tolist():
            row, place = torch.where(which == number)
            total = total.index_add(0, row, self.stones[number](grains[row]) * share[row, place, None])
        return total

    def forward(self, grains: Tensor, which: Tensor, share: Tensor) -> Tensor:
        return self.carve(grains, which, share)


class Blend(nn.Module):
    """A MoE layer: router, region, and (optionally) an always-active expert."""

    def __init__(
        self,
        quarry: Callable[[], nn.Module] = Quarry,
        constant: Callable[[], nn.Module] | None = Wedge,
        pool: int = POOL,
        picks: int = PICKS,
    ) -> None:
        super().__init__()
        self.picks = picks
        self.compass = nn.Linear(WIDTH, pool)
        self.quarry = quarry()
        self.constant = constant() if constant is not None else None

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        share, which = self.compass(rows).softmax(-1).topk(self.picks, dim=-1)
        return which, share

    def forward(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        mixed: Tensor = self.quarry(rows, *self.choose(rows)).view(z.shape)
        return mixed if self.constant is None else mixed + self.constant(z)


class Mixing(nn.Module):
    """Self-attention; `mask` and `kv_heads` make its variants."""

    def __init__(self, masked: bool = False, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads, self.each = kv_heads, WIDTH // HEADS
        self.ask = nn.Linear(WIDTH, WIDTH)
        self.keep = nn.Linear(WIDTH, 2 * kv_heads * self.each)
        self.back = nn.Linear(WIDTH, WIDTH)
        self.masked = masked

    def forward(self, z: Tensor) -> Tensor:
        batch, tokens, _ = z.shape
        q = self.ask(z).view(batch, tokens, HEADS, self.each).transpose(1, 2)
        k, v = self.keep(z).view(batch, tokens, 2, self.kv_heads, self.each).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=z.device).tril() if self.masked else None
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.kv_heads != HEADS)
        out: Tensor = self.back(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out


class Storey(nn.Module):
    """One block: gated attention, then a gated layer."""

    def __init__(self, layer: Callable[[], nn.Module], mixing: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.level = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mixing = mixing()
        self.layer = layer()
        self.valves = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, z: Tensor, mood: Tensor) -> Tensor:
        first, second = self.valves(mood).unsqueeze(1).chunk(2, dim=-1)
        z = z + first * self.mixing(self.level(z))
        out: Tensor = z + second * self.layer(self.level(z))
        return out


class Toy(nn.Module):
    """(grid [B, T, WIDTH], clock [B]) -> [B, T, WIDTH]; every storey has a layer of its own."""

    def __init__(
        self,
        layer: Callable[[], nn.Module] = Blend,
        mixing: Callable[[], nn.Module] = Mixing,
        height: int = 1,
        finish: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.register_buffer("pitch", torch.logspace(0, -2, WIDTH // 2), persistent=False)
        self.storeys = nn.ModuleList(Storey(layer, mixing) for _ in range(height))
        self.finish = finish()

    def forward(self, grid: Tensor, clock: Tensor) -> Tensor:
        phase = clock[:, None] * self.pitch
        mood = torch.cat([phase.sin(), phase.cos()], dim=-1)
        for storey in self.storeys:
            grid = storey(grid, mood)
        out: Tensor = self.finish(grid)
        return out


def toy(
    layer: Callable[[], nn.Module] = Blend,
    mixing: Callable[[], nn.Module] = Mixing,
    height: int = 1,
    finish: Callable[[], nn.Module] = nn.Identity,
    seed: int = 0,
) -> Toy:
    """A seeded toy in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Toy(layer, mixing, height, finish).eval().requires_grad_(False)


def toy_inputs(batch: int = 3, seed: int = 0, clock: float = 0.1) -> tuple[Tensor, Tensor]:
    """grid [B, T, WIDTH], clock [B]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TOKENS, WIDTH, generator=generator), torch.full((batch,), clock)
