"""Initial weights: the published zero-gated start for training, and a lively random one for tests."""

import math

import torch
from torch import Tensor, nn

from moeca_fx.zoo.layers import LabelEmbedder, PatchEmbed, TimestepEmbedder

BIAS_SPREAD = 0.02
LABEL_SPREAD = 0.5
MODULATION_SPREAD = 0.3
CORRECTION_SPREAD = 0.05


@torch.no_grad()
def publish_init_(model: nn.Module) -> None:
    """Initialise for training the way DiT does, in place: adaLN gates and the final layer start at zero.

    Linear weights are Xavier-uniform with zero biases, label and timestep embeddings normal(0, 0.02). Draws
    from the global generator: seed it first.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.flatten(1))
            nn.init.zeros_(module.proj.bias)  # type: ignore[arg-type]  # this convolution has a bias
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
        elif isinstance(module, TimestepEmbedder):
            for layer in module.mlp.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a zoo model with seeded random weights under which every part does something, in place.

    Published models start with adaLN gates and final layer at zero, so a fresh one returns zeros whatever its
    experts do. Here gates are about 0.3, router logits spread about 1, and the correction bias is non-zero.
    Fixed tables (position embedding, RoPE) are kept.

    Args:
        model: any zoo model, also a tiny configuration.
        seed: of a private generator; the global one is not touched.

    Returns:
        `model`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, spread: float, centre: float = 0.0) -> None:
        draw = torch.randn(like.shape, generator=generator) * spread + centre
        like.copy_(draw)

    for name, tensor in model.state_dict().items():
        leaf = name.rsplit(".", 1)[-1]
        if name == "pos_embed":
            continue
        if leaf == "e_score_correction_bias":
            normal(tensor, CORRECTION_SPREAD)
        elif name.endswith("_norm.weight"):
            normal(tensor, 0.1, centre=1.0)
        elif name.endswith("embedding_table.weight"):
            normal(tensor, LABEL_SPREAD)
        elif leaf == "bias":
            normal(tensor, MODULATION_SPREAD if "adaLN_modulation" in name else BIAS_SPREAD)
        else:  # a matrix or a patch convolution: unit gain
            normal(tensor, 1.0 / math.sqrt(tensor[0].numel()))
    return model
