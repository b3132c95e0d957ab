"""Layers that DSMoE and DiT-MoE share, with the parameter names of the published checkpoints.

Both families descend from DiT (arXiv 2212.09748): a patch embedding, a sinusoidal timestep embedding and a
label embedding feed adaLN-Zero blocks. The layers are written here so that the zoo needs torch alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEP_WIDTH = 256
MAX_PERIOD = 10000.0


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply one adaLN shift and scale per sample.

    Args:
        x: normalised tokens [B, T, H].
        shift, scale: [B, H].
    """
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def plain_norm(width: int) -> nn.LayerNorm:
    """The affine-free LayerNorm (eps 1e-6) that every adaLN block uses."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each one: [B, C, S, S] -> [B, T, H], row-major."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, C, S, S] -> tokens [B, T, H]."""
        patches: Tensor = self.proj(x)  # [B, H, S/p, S/p]
        return patches.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embed a timestep [B] (any real number, used unscaled) as [B, H]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps [B] -> [B, H]."""
        half = TIMESTEP_WIDTH // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        frequency = torch.exp(steps * (-math.log(MAX_PERIOD) / half))
        phase = t[:, None].float() * frequency[None]  # [B, half]
        waves = torch.cat([phase.cos(), phase.sin()], dim=-1).to(next(self.mlp.parameters()).dtype)
        embedding: Tensor = self.mlp(waves)
        return embedding


class LabelEmbedder(nn.Module):
    """Embed class labels [B] as [B, H]; training drops a label to the null class at rate `dropout`."""

    def __init__(self, num_classes: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        null_rows = 1 if dropout > 0 else 0
        self.embedding_table = nn.Embedding(num_classes + null_rows, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels [B] int64 -> [B, H]."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        embedding: Tensor = self.embedding_table(labels)
        return embedding


class SwiGLU(nn.Module):
    """A gated expert without biases: `down(silu(gate(x)) * up(x))`, rows [M, H] -> [M, H]."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., H] -> [..., H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class FinalLayer(nn.Module):
    """The last adaLN (shift and scale, no gate) and the projection of tokens to patches [B, T, p*p*C]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [B, T, H] and condition [B, H] -> patches [B, T, p*p*C]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """Put patches back into an image: [B, T, p*p*C] -> [B, C, S, S].

    A token's values are ordered (patch row, patch column, channel); tokens are row-major.
    """
    batch, count, _ = tokens.shape
    side = math.isqrt(count)
    grid = tokens.reshape(batch, side, side, patch_size, patch_size, channels)
    image = grid.permute(0, 5, 1, 3, 2, 4)  # [B, C, row, patch row, column, patch column]
    return image.reshape(batch, channels, side * patch_size, side * patch_size)


def guide(prediction: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance on channels 0-2 of a stacked batch, as the DiT samplers publish it.

    Args:
        prediction: [2B, C, S, S], conditional half first, unconditional half second.
        cfg_scale: 1 gives the conditional prediction, more extrapolates away from the unconditional one.

    Returns:
        [2B, C, S, S]; channels 0-2 are guided and equal in both halves, the rest is passed through.
    """
    guided, rest = prediction[:, :3], prediction[:, 3:]
    conditional, unconditional = guided.chunk(2, dim=0)
    mixed = unconditional + cfg_scale * (conditional - unconditional)
    return torch.cat([torch.cat([mixed, mixed], dim=0), rest], dim=1)
