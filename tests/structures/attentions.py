"""Attention as public diffusion transformers write it. Each: ([B, T, H], context [B, S, H] or None) -> [B, T, H]."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 2


class SDPA(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class ByHand(SDPA):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (width // HEADS) ** -0.5) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class QKNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(width // HEADS, eps=1e-6) for _ in range(2))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class Rotary(SDPA):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        each = width // HEADS // 2
        angles = torch.arange(tokens, device=x.device)[:, None] * 0.1 ** (torch.arange(each, device=x.device) / each)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)  # [T, d]
        q, k = (part * cos + self._half_turn(part) * sin for part in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))

    @staticmethod
    def _half_turn(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return torch.cat((-right, left), dim=-1)


class GroupedQuery(nn.Module):
    """Four query heads over two heads of keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q_proj(x).view(batch, tokens, 4, width // 4).transpose(1, 2)
        k, v = self.kv_proj(x).view(batch, tokens, 2, 2, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Sinks(SDPA):
    """A learnt score of each head takes part in the softmax and is dropped."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(width // HEADS)
        sinks = self.sinks.view(1, HEADS, 1, 1).expand(batch, -1, tokens, -1)
        shares = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        mixed = torch.einsum("bhqk,bhkd->bqhd", shares, v)
        return self.proj(mixed.reshape(batch, tokens, width))


class Joint(nn.Module):
    """Image and text tokens attend to each other; the text has projections of its own and is not updated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.add_qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        assert context is not None, "text tokens"
        tokens = x.shape[1]
        both = torch.cat([self.qkv(x), self.add_qkv(context)], dim=1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in both.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image, _ = mixed.split_with_sizes([tokens, context.shape[1]], dim=1)
        return self.proj(image)


class Cross(nn.Module):
    """Attention to the text; a sublayer of its own after self-attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        assert context is not None, "text tokens"
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.kv(context).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


ATTENTIONS: dict[str, type[nn.Module]] = {
    "sdpa": SDPA,
    "by_hand": ByHand,
    "qk_norm": QKNorm,
    "rope": Rotary,
    "gqa": GroupedQuery,
    "sinks": Sinks,
    "joint": Joint,
    "cross": QKNorm,  # a `Cross` follows in the block
}
