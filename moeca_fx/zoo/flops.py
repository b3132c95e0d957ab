"""Count the FLOPs of a zoo model from its config: its data-dependent expert loops defeat meta tensors.

Matrix products and convolutions only, 2 FLOPs a multiply-add, as `torch.utils.flop_counter` counts them.
"""

from moeca_fx.zoo.dit_moe_config import DiTMoEConfig
from moeca_fx.zoo.dsmoe_config import DSMoEConfig
from moeca_fx.zoo.layers import TIMESTEP_WIDTH


def forward_flops(config: DSMoEConfig | DiTMoEConfig) -> int:
    """FLOPs of one forward pass of one sample.

    Args:
        config: sizes of a DSMoE or a DiT-MoE.

    Returns:
        2 x multiply-adds of: patch embedding, timestep embedding, per block adaLN, attention (projections and
        both products), feed-forward (dense, or router + k routed experts + shared expert), final layer.
    """
    width, tokens = config.hidden_size, config.tokens
    patch = config.patch_size**2
    ends = tokens * width * patch * (config.in_channels + config.out_channels)
    condition = (TIMESTEP_WIDTH + width) * width + 2 * width * width  # timestep MLP, final adaLN
    blocks = sum(_block(config, i) for i in range(config.depth))
    return 2 * (ends + condition + blocks)


def _block(config: DSMoEConfig | DiTMoEConfig, block: int) -> int:
    """Multiply-adds of one block."""
    width, tokens = config.hidden_size, config.tokens
    modulation = 6 * width * width
    attention = tokens * (4 * width * width + 2 * tokens * width)
    return modulation + attention + tokens * _feed_forward(config, block)


def _feed_forward(config: DSMoEConfig | DiTMoEConfig, block: int) -> int:
    """Multiply-adds of one token in a block's feed-forward."""
    width = config.hidden_size
    if isinstance(config, DiTMoEConfig):
        shared = config.shared_width
    elif config.is_moe(block):
        shared = config.expert_width
    else:
        return 2 * width * int(width * config.mlp_ratio)
    return width * config.num_experts + 3 * width * (config.top_k * config.expert_width + shared)
