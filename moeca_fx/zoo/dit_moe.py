"""DiT-MoE (arXiv 2407.11633): a DiT whose every block holds a softmax top-2 mixture of experts.

The parameter names are the published ones. Inference runs through `moe_infer`, which sorts the branches by
expert, reads the counts on the host and loops over the experts: the baseline users have, and a form no
exporter can follow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_fx.errors import require
from moeca_fx.zoo.attention import Attention, PackedAttention
from moeca_fx.zoo.dit_moe_config import DIT_MOE_CONFIGS, DiTMoEConfig
from moeca_fx.zoo.layers import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    guide,
    modulate,
    plain_norm,
    unpatchify,
)

__all__ = ["DIT_MOE_CONFIGS", "DiTMoE", "DiTMoEConfig"]


def sincos_table(side: int, width: int) -> Tensor:
    """The fixed 2-D position table [1, side*side, width], row-major.

    The first half of `width` encodes the column, the second the row; each as [sin | cos] of position *
    10000^(-i/n) with n = width / 4 frequencies.
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    phase = torch.outer(torch.arange(side, dtype=torch.float64), frequency)
    waves = torch.cat([phase.sin(), phase.cos()], dim=1)  # [side, width / 2]
    row = waves.repeat_interleave(side, dim=0)
    column = waves.repeat(side, 1)
    return torch.cat([column, row], dim=1).float().unsqueeze(0)


class SlicedSwiGLU(nn.Module):
    """A gated expert [M, H] -> [M, H] whose matrices are multiplied in slices of the inner width."""

    def __init__(self, hidden_size: int, width: int, slices: int) -> None:
        super().__init__()
        self.slices = slices
        self.slice_width = width // slices
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., H] -> [..., H]."""
        if self.slices == 1:
            out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            return out
        size = self.slice_width
        gate = torch.cat([F.linear(x, part) for part in torch.split(self.gate_proj.weight, size, dim=0)], dim=-1)
        up = torch.cat([F.linear(x, part) for part in torch.split(self.up_proj.weight, size, dim=0)], dim=-1)
        inner = torch.split(F.silu(gate) * up, size, dim=-1)
        down = torch.split(self.down_proj.weight, size, dim=1)
        partial = [F.linear(a, part) for a, part in zip(inner, down, strict=True)]
        total = partial[0]
        for part in partial[1:]:
            total = total + part
        return total


class SoftmaxGate(nn.Module):
    """Choose the `top_k` experts by softmax score; the scores are the weights, not renormalised."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, H] -> expert ids [B*T, k] int64 and weights [B*T, k]."""
        scores = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight).softmax(dim=-1)
        weight, index = scores.topk(self.top_k, dim=-1, sorted=False)
        return index, weight


class SparseMoE(nn.Module):
    """Router, routed experts and one always-active shared expert: [B, T, H] -> [B, T, H]."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        width = config.hidden_size
        self.experts = nn.ModuleList(
            SlicedSwiGLU(width, config.expert_width, config.slices) for _ in range(config.num_experts)
        )
        self.gate = SoftmaxGate(width, config.num_experts, config.top_k)
        self.shared_experts = SlicedSwiGLU(width, config.shared_width, config.slices)

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens [B, T, H] -> [B, T, H]."""
        index, weight = self.gate(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.training:
            routed = self._moe_train(rows, index, weight)
        else:
            routed = self.moe_infer(rows, index.view(-1), weight.view(-1, 1))
        out: Tensor = routed.view(hidden.shape) + self.shared_experts(hidden)
        return out

    def _moe_train(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The differentiable path: every branch in its own row, then a weighted sum over k."""
        repeated = x.repeat_interleave(self.top_k, dim=0)  # [M*k, H]
        flat = index.view(-1)
        branch = torch.zeros_like(repeated)
        for number, expert in enumerate(self.experts):
            rows = (flat == number).nonzero().flatten()
            branch = branch.index_copy(0, rows, expert(repeated[rows]).to(branch.dtype))
        return (branch.view(*index.shape, -1) * weight.unsqueeze(-1)).sum(dim=1)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        """Weighted sum of the selected experts' outputs.

        Args:
            x: tokens [M, H].
            flat_expert_indices: expert of each branch [M*k], token-major.
            flat_expert_weights: weight of each branch [M*k, 1].

        Returns:
            [M, H].
        """
        total = torch.zeros_like(x)
        order = flat_expert_indices.argsort()
        ends = flat_expert_indices.bincount().cpu().numpy().cumsum(0)
        tokens = order // self.top_k
        start = 0
        for number, end in enumerate(ends):
            if start == end:
                continue
            rows = tokens[start:end]
            branch = self.experts[number](x[rows])
            branch.mul_(flat_expert_weights[order[start:end]])
            total = total.to(branch.dtype)
            total.scatter_reduce_(0, rows.view(-1, 1).repeat(1, x.shape[-1]), branch, reduce="sum")
            start = end
        return total


class DiTMoEBlock(nn.Module):
    """One adaLN-Zero transformer block with a mixture of experts."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = plain_norm(width)
        self.attn = (PackedAttention if config.packed_attention else Attention)(width, config.num_heads)
        self.norm2 = plain_norm(width)
        self.moe = SparseMoE(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [B, T, H] and condition [B, H] -> tokens [B, T, H]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        out: Tensor = x + gate_m.unsqueeze(1) * self.moe(modulate(self.norm2(x), shift_m, scale_m))
        return out


class DiTMoE(nn.Module):
    """The DiT-MoE denoiser.

    Args:
        config: sizes; `DIT_MOE_CONFIGS` holds the published ones.

    Raises:
        MissingExtraError: numpy is not installed.
    """

    def __init__(self, config: DiTMoEConfig) -> None:
        require("numpy", "demo")  # `moe_infer` reads its counts through numpy, as published
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size, config.class_dropout)
        self.pos_embed = nn.Parameter(sincos_table(config.grid, config.hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTMoEBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size, config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (DDPM models) or the velocity (rectified-flow models).

        Args:
            x: noisy latents [B, C, S, S].
            t: timesteps [B] on the scale the weights were trained with (DDPM: 0-999).
            y: class labels [B] int64; `num_classes` is the null class.

        Returns:
            [B, 2C, S, S] (C channels without `learn_sigma`).
        """
        tokens = self.x_embedder(x) + self.pos_embed  # [B, T, H]
        condition = self.t_embedder(t) + self.y_embedder(y)  # [B, H]
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)
        return unpatchify(patches, self.config.patch_size, self.config.out_channels)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guided prediction of a stacked batch whose first half of `x` serves both halves.

        Args:
            x: [2B, C, S, S]; only the first B samples are read.
            t: [2B].
            y: [2B], the wanted classes, then the null class.
            cfg_scale: guidance strength, applied to channels 0-2.

        Returns:
            [2B, out channels, S, S].
        """
        half = x[: len(x) // 2]
        prediction = self.forward(torch.cat([half, half], dim=0), t, y)
        return guide(prediction, cfg_scale)
