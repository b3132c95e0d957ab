"""DSMoE (arXiv 2512.01252): even blocks dense, odd blocks a DeepSeek-V3 style mixture of experts.

The parameter names are the published ones, so a published state dict loads with ``strict=True``. The expert
loop is written the way users have it, one Python iteration per expert that was hit: it is the baseline this
package speeds up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_fx.zoo.attention import Attention
from moeca_fx.zoo.dsmoe_config import DSMOE_CONFIGS, DSMoEConfig
from moeca_fx.zoo.layers import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    SwiGLU,
    TimestepEmbedder,
    guide,
    modulate,
    plain_norm,
    unpatchify,
)

__all__ = ["DSMOE_CONFIGS", "DSMoE", "DSMoEConfig", "DSMoEOutput"]

DSMoEOutput = tuple[Tensor, str, None, None, None, float]


class DenseMlp(nn.Module):
    """The feed-forward of a dense block: two biased matrices with SiLU between, [B, T, H] -> [B, T, H]."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, H] -> [B, T, H]."""
        out: Tensor = self.fc2(F.silu(self.fc1(x)))
        return out


class RouterGate(nn.Module):
    """Router logits in fp32 from tokens of any floating dtype; also owns the selection's correction bias."""

    e_score_correction_bias: Tensor

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.kaiming_normal_(self.weight)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens [B, T, H] -> logits [B*T, E] in fp32."""
        rows, weight = hidden.reshape(-1, hidden.shape[-1]).float(), self.weight.float()
        if torch.is_autocast_enabled(hidden.device.type):
            # Mixed-precision training must not round the router.
            with torch.autocast(hidden.device.type, enabled=False):
                return F.linear(rows, weight)
        return F.linear(rows, weight)


class RoutedExperts(nn.Module):
    """The routed experts and the loop over those that were hit."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.blocks = nn.ModuleList(SwiGLU(hidden_size, width) for _ in range(num_experts))

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Sum of the selected experts' outputs, weighted.

        Args:
            hidden: tokens [M, H].
            index: expert ids [M, k].
            weight: routing weights [M, k].

        Returns:
            [M, H] in the dtype of `hidden`.
        """
        total = torch.zeros_like(hidden)
        chosen = F.one_hot(index, num_classes=self.num_experts).permute(2, 1, 0)  # [E, k, M]
        hit = chosen.sum(dim=(1, 2)).gt(0).nonzero().flatten()
        for expert in hit:
            slot, token = torch.where(chosen[expert])
            branch = self.blocks[int(expert)](hidden[token]) * weight[token, slot, None]
            total.index_add_(0, token, branch.to(total.dtype))
        return total


class MoELayer(nn.Module):
    """Router, routed experts and one always-active shared expert: [B, T, H] -> [B, T, H]."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = RoutedExperts(config.num_experts, config.hidden_size, config.expert_width)
        self.gate = RouterGate(config.hidden_size, config.num_experts)
        self.shared_experts = SwiGLU(config.hidden_size, config.expert_width)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights of every token.

        The choice goes by sigmoid score plus correction bias, inside the best `topk_group` groups; the
        weights are the *unbiased* scores of the chosen, renormalised to sum 1 and multiplied by the routed
        scale.

        Args:
            logits: [M, E] fp32.

        Returns:
            ids [M, k] int64 and weights [M, k] fp32.
        """
        config = self.config
        score = logits.sigmoid()
        preference = score + self.gate.e_score_correction_bias
        if config.n_group > 1:
            preference = self._keep_best_groups(preference)
        index = preference.topk(config.top_k, dim=-1, sorted=False).indices
        weight = score.gather(1, index)
        if config.top_k > 1:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        return index, weight * config.routed_scale

    def _keep_best_groups(self, preference: Tensor) -> Tensor:
        """Zero the preference [M, E] outside the groups whose two best experts score highest together."""
        config = self.config
        grouped = preference.view(-1, config.n_group, config.num_experts // config.n_group)
        strength = grouped.topk(2, dim=-1).values.sum(dim=-1)  # [M, n_group]
        best = strength.topk(config.topk_group, dim=-1, sorted=False).indices
        kept = torch.zeros_like(strength).scatter_(1, best, 1.0).bool()
        return grouped.masked_fill(~kept.unsqueeze(-1), 0.0).flatten(1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens [B, T, H] -> [B, T, H]."""
        index, weight = self.route(self.gate(hidden))
        routed = self.experts(hidden.reshape(-1, hidden.shape[-1]), index, weight)
        out: Tensor = routed.view(hidden.shape) + self.shared_experts(hidden)
        return out


class DSMoEBlock(nn.Module):
    """One adaLN-Zero transformer block; `mlp` is dense or a mixture of experts."""

    def __init__(self, config: DSMoEConfig, moe: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = plain_norm(width)
        self.attn = Attention(width, config.num_heads, grid=config.grid)
        self.norm2 = plain_norm(width)
        self.mlp = MoELayer(config) if moe else DenseMlp(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [B, T, H] and condition [B, H] -> tokens [B, T, H]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        out: Tensor = x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return out


class DSMoE(nn.Module):
    """The DSMoE denoiser.

    Args:
        config: sizes and routing; `DSMOE_CONFIGS` holds the published ones.
    """

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size, config.class_dropout)
        self.blocks = nn.ModuleList(DSMoEBlock(config, config.is_moe(i)) for i in range(config.depth))
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size, config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> DSMoEOutput:
        """Predict the velocity (rectified flow).

        Args:
            x: noisy latents [B, C, S, S].
            t: timesteps [B], unscaled: 0 is noise, 1 is data.
            y: class labels [B] int64; `num_classes` is the null class.

        Returns:
            The published six-tuple. Item 0 is the prediction [B, 2C, S, S] (C channels without `learn_sigma`;
            rectified flow uses the first C); the others are constants that the published training loop reads.
        """
        tokens = self.x_embedder(x)  # [B, T, H]
        condition = self.t_embedder(t) + self.y_embedder(y)  # [B, H]
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)
        prediction = unpatchify(patches, self.config.patch_size, self.config.out_channels)
        return prediction, "Nothing", None, None, None, 0.01

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
        prediction = self.forward(torch.cat([half, half], dim=0), t, y)[0]
        return guide(prediction, cfg_scale)
