"""Models that must be refused: no mixture of experts, or one that no cache can serve."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structures.experts import GEGLU, SwiGLU
from tests.structures.model import FeedForward, build
from tests.structures.structure import Structure

EXPERTS, K, INNER = 4, 2, 16
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Plain(nn.Module):
    """The layer that the others change in one place; it is proven and transformed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(self.expert(width) for _ in range(EXPERTS))

    def expert(self, width: int) -> nn.Module:
        return SwiGLU(width, INNER)

    def logits(self, rows: Tensor, batch: int) -> Tensor:
        return self.gate(rows)

    def route(self, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(rows, batch).softmax(dim=-1).topk(K, dim=-1)
        return weights, ids

    def dispatch(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(rows, len(x))
        return self.dispatch(rows, ids, weights).view_as(x)


class BatchCapacity(Plain):
    """The queue of an expert runs over the tokens of all samples."""

    def route(self, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(rows, batch)
        place = F.one_hot(ids.flatten(), EXPERTS).cumsum(dim=0).gather(1, ids.reshape(-1, 1)).view_as(ids)
        return weights * (place <= len(rows) * K // EXPERTS), ids


class BatchExpertChoice(Plain):
    """An expert chooses among the tokens of all samples."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(rows).softmax(dim=-1).t().topk(len(rows) * K // EXPERTS, dim=-1)  # [E, C]
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            y = expert(rows[chosen[number]]) * weights[number, :, None]
            out = out.index_add(0, chosen[number], y)
        return out.view_as(x)


class BatchMean(Plain):
    """Logits are normalised over all tokens of the batch."""

    def logits(self, rows: Tensor, batch: int) -> Tensor:
        logits = self.gate(rows)
        return (logits - logits.mean(dim=0)) / logits.std(dim=0)


class NoisyGate(Plain):
    """The gate's noise is added in eval mode too."""

    def logits(self, rows: Tensor, batch: int) -> Tensor:
        logits = self.gate(rows)
        return logits + 0.1 * torch.randn_like(logits)


class DroppingExpert(SwiGLU):
    """Functional dropout, which is on unless told otherwise."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.dropout(super().forward(hidden_states), 0.1)


class Dropout(Plain):
    def expert(self, width: int) -> nn.Module:
        return DroppingExpert(width, INNER)


class CountingExpert(SwiGLU):
    """Counts its tokens in a buffer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.seen += len(hidden_states)
        return super().forward(hidden_states)


class Stateful(Plain):
    def expert(self, width: int) -> nn.Module:
        return CountingExpert(width, INNER)


class MovingBias(Plain):
    """A correction bias that follows the load at every call, in eval mode too."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def route(self, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        scores = self.gate(rows).softmax(dim=-1)
        ids = (scores + self.bias).topk(K, dim=-1)[1]
        load = F.one_hot(ids, EXPERTS).float().mean(dim=(0, 1))
        self.bias = self.bias + 0.01 * torch.sign(load.mean() - load)
        return scores.gather(1, ids), ids


class NumberOfCalls(Plain):
    """Counts its calls in a Python number."""

    calls = 0

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class TwoKinds(Plain):
    """Two experts of one form, two of another."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.experts = nn.ModuleList([SwiGLU(width, INNER), GEGLU(width, INNER), SwiGLU(width, INNER), GEGLU(width, 8)])


class UNet(nn.Module):
    """(x [B, C, h, w], t [B]) -> [B, C, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.down = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)])
        self.middle = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])
        self.up = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = F.silu(self.down[0](x) + self.time(t[:, None])[..., None, None])
        h = F.silu(self.down[1](skip))
        for layer in self.middle:
            h = h + F.silu(layer(h))
        return self.up(torch.cat([F.interpolate(h, scale_factor=2), skip], dim=1))


class LanguageModel(nn.Module):
    """(ids [B, T]) -> logits [B, T, V]: causal attention, then the plain layer."""

    def __init__(self, width: int = 24, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Plain(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(self.norm(x)))


def with_layer(layer: Callable[[int], nn.Module], batch: int = 2) -> Built:
    """A diffusion transformer around a layer."""
    return build(Structure(), layer=layer, batch=batch)


def dense() -> Built:
    return with_layer(FeedForward)


def unet() -> Built:
    torch.manual_seed(0)
    return UNet().eval(), (torch.randn(2, 4, 8, 8), torch.rand(2)), {}


def language_model(batch: int = 2) -> Built:
    torch.manual_seed(0)
    return LanguageModel().eval(), (torch.randint(0, 11, (batch, 12)),), {}
