"""Sizes of the DiT-MoE family: a validated config and the four published rows (arXiv 2407.11633)."""

from dataclasses import dataclass

from moeca_fx.errors import ConfigError


@dataclass(frozen=True)
class DiTMoEConfig:
    """Sizes of a `DiTMoE`; every block is MoE.

    Attributes:
        input_size: side S of the square input, in latents.
        patch_size: side of a patch; the model has (S / patch_size)^2 tokens.
        in_channels: channels C of the input.
        hidden_size: width H of a token, a multiple of 4 (sin-cos position table).
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of a routed expert over H.
        num_experts: routed experts E.
        top_k: experts per token k.
        shared_ratio: width of the shared expert over H.
        slices: parts in which every expert matrix is multiplied (`pretraining_tp` of the published models).
        packed_attention: the flash-attention layout with query/key norms (XL, G) instead of the timm one.
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
    mlp_ratio: int = 4
    num_experts: int = 8
    top_k: int = 2
    shared_ratio: int = 2
    slices: int = 2
    packed_attention: bool = False
    num_classes: int = 1000
    learn_sigma: bool = True
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "mlp_ratio",
            "num_experts",
            "top_k",
            "shared_ratio",
            "slices",
            "num_classes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"DiTMoEConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ConfigError(
                f"DiTMoEConfig.input_size ({self.input_size}) must be a multiple of patch_size ({self.patch_size})"
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ConfigError(
                f"DiTMoEConfig.hidden_size ({self.hidden_size}) must be a multiple of 4 and of num_heads "
                f"({self.num_heads})"
            )
        if self.top_k > self.num_experts:
            raise ConfigError(f"DiTMoEConfig.top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")
        if self.expert_width % self.slices or self.shared_width % self.slices:
            raise ConfigError(
                f"DiTMoEConfig.slices ({self.slices}) must divide the expert widths "
                f"({self.expert_width} and {self.shared_width})"
            )
        if not 0 <= self.class_dropout < 1:
            raise ConfigError(f"DiTMoEConfig.class_dropout must be in [0, 1), got {self.class_dropout}")

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

    @property
    def expert_width(self) -> int:
        """Inner width of a routed expert."""
        return self.mlp_ratio * self.hidden_size

    @property
    def shared_width(self) -> int:
        """Inner width of the shared expert."""
        return self.shared_ratio * self.hidden_size


DIT_MOE_CONFIGS: dict[str, DiTMoEConfig] = {
    "dit-moe-s": DiTMoEConfig(),
    "dit-moe-b": DiTMoEConfig(hidden_size=768, num_heads=12),
    "dit-moe-xl": DiTMoEConfig(hidden_size=1152, depth=28, num_heads=16, packed_attention=True),
    "dit-moe-g": DiTMoEConfig(hidden_size=1408, depth=40, num_heads=16, num_experts=16, packed_attention=True),
}
