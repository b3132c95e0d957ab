"""Self-attention of the zoo: the timm layout with 2-D RoPE, and the packed layout with query/key norms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rope_tables(side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [T, head_dim] of 2-D rotary embedding on a `side` x `side` row-major grid.

    The first half of a head turns with the row, the second with the column. Each half has head_dim/4
    frequencies 10000^(-i/(head_dim/4)), and its phases are laid out twice, so that rotation
    pairs i with i + head_dim/4.
    """
    quarter = head_dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    position = torch.arange(side, dtype=torch.float32)
    phase = torch.outer(position, frequency).repeat(1, 2)  # [side, head_dim / 2]
    row = phase.repeat_interleave(side, dim=0)  # [T, head_dim / 2]
    column = phase.repeat(side, 1)
    both = torch.cat([row, column], dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, h, T, d] by the tables of `rope_tables`."""
    row_a, row_b, col_a, col_b = x.chunk(4, dim=-1)
    turned = torch.cat([-row_b, row_a, -col_b, col_a], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention [B, T, H] -> [B, T, H] with the names `qkv`, `proj`.

    Args:
        hidden_size: H, divisible by `num_heads`.
        num_heads: h.
        grid: side of the token grid for 2-D RoPE; None for no rotary embedding. The tables are not in the
            state dict.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, hidden_size: int, num_heads: int, grid: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.rotary = grid is not None
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        if grid is not None:
            cos, sin = rope_tables(grid, self.head_dim)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token: [B, T, H] -> [B, T, H]."""
        batch, tokens, _ = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, h, T, d]
        if self.rotary:
            q, k = rotate(q, self.rope_cos, self.rope_sin), rotate(k, self.rope_cos, self.rope_sin)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out


class PackedAttention(nn.Module):
    """Multi-head self-attention [B, T, H] -> [B, T, H] in the flash-attention layout: `Wqkv`, `out_proj`.

    Queries and keys pass an affine LayerNorm (`q_norm`, `k_norm`) over the head width before the product.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token: [B, T, H] -> [B, T, H]."""
        batch, tokens, _ = x.shape
        packed = self.Wqkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = packed.unbind(2)  # each [B, T, h, d]
        q, k = self.q_norm(q), self.k_norm(k)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out
