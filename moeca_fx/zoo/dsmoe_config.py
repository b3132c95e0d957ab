"""Sizes of the DSMoE family: a validated config and the seven published rows (arXiv 2512.01252)."""

from dataclasses import dataclass

from moeca_fx.errors import ConfigError


@dataclass(frozen=True)
class DSMoEConfig:
    """Sizes and routing of a `DSMoE`.

    Attributes:
        input_size: side S of the square input, in latents (or pixels).
        patch_size: side of a patch; the model has (S / patch_size)^2 tokens.
        in_channels: channels C of the input.
        hidden_size: width H of a token.
        depth: number of blocks; with `interleave`, odd blocks are MoE and even ones dense, else all are MoE.
        num_heads: attention heads; H / num_heads must be a multiple of 4 (2-D RoPE).
        mlp_ratio: width of a dense feed-forward over H.
        num_experts: routed experts E of a MoE block.
        top_k: experts per token k.
        expert_width: inner width I of a routed expert and of the shared expert.
        n_group, topk_group: DeepSeek-V3 group-limited routing; equal numbers mean no limit.
        routed_scale: factor on the renormalised routing weights.
        num_classes: classes without the null class.
        learn_sigma: predict 2C channels instead of C.
        class_dropout: probability of the null class in training; 0 removes the null row.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_experts: int = 48
    top_k: int = 5
    expert_width: int = 128
    n_group: int = 1
    topk_group: int = 1
    routed_scale: float = 2.5
    num_classes: int = 1000
    learn_sigma: bool = True
    class_dropout: float = 0.1
    interleave: bool = True

    def __post_init__(self) -> None:
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "num_experts",
            "top_k",
            "expert_width",
            "n_group",
            "topk_group",
            "num_classes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"DSMoEConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ConfigError(
                f"DSMoEConfig.input_size ({self.input_size}) must be a multiple of patch_size ({self.patch_size})"
            )
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"DSMoEConfig.hidden_size ({self.hidden_size}) must be a multiple of 4 * num_heads "
                f"({4 * self.num_heads}): 2-D RoPE splits a head in four"
            )
        if self.top_k > self.num_experts:
            raise ConfigError(f"DSMoEConfig.top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            raise ConfigError(
                f"DSMoEConfig: n_group ({self.n_group}) must divide num_experts ({self.num_experts}) and "
                f"topk_group ({self.topk_group}) must not exceed n_group"
            )
        if self.n_group > 1 and self.num_experts // self.n_group < 2:
            raise ConfigError("DSMoEConfig: a routing group needs at least 2 experts; lower n_group")
        if self.top_k > self.topk_group * (self.num_experts // self.n_group):
            raise ConfigError(f"DSMoEConfig.top_k ({self.top_k}) exceeds the experts of {self.topk_group} groups")
        if self.mlp_ratio <= 0 or self.routed_scale <= 0:
            raise ConfigError("DSMoEConfig.mlp_ratio and routed_scale must be positive")
        if not 0 <= self.class_dropout < 1:
            raise ConfigError(f"DSMoEConfig.class_dropout must be in [0, 1), got {self.class_dropout}")

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens T of one sample."""
        return self.grid**2

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def is_moe(self, block: int) -> bool:
        """Whether block number `block` holds experts."""
        return block % 2 == 1 if self.interleave else True


def _e16(width: int, depth: int, heads: int, expert_width: int) -> DSMoEConfig:
    return DSMoEConfig(
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        num_experts=16,
        top_k=2,
        expert_width=expert_width,
        n_group=2,
        topk_group=2,
        routed_scale=2.0,
    )


def _e48(width: int, depth: int, heads: int, expert_width: int) -> DSMoEConfig:
    return DSMoEConfig(hidden_size=width, depth=depth, num_heads=heads, expert_width=expert_width)


DSMOE_CONFIGS: dict[str, DSMoEConfig] = {
    "dsmoe-s-e16": _e16(384, 10, 6, 768),
    "dsmoe-s-e48": _e48(384, 12, 6, 128),
    "dsmoe-b-e16": _e16(768, 10, 12, 1536),
    "dsmoe-b-e48": _e48(768, 12, 12, 256),
    "dsmoe-l-e16": _e16(1024, 20, 16, 2048),
    "dsmoe-l-e48": _e48(1024, 24, 16, 448),
    "dsmoe-3b-e16": _e16(1152, 30, 16, 2880),
}
