"""A zoo model taken apart at its block boundaries and sublayers, batched: tokens [B, T, H], condition [B, H].

block:  x = x + gate_a * attn(norm1(x) * (1 + scale_a) + shift_a)
        x = x + gate_f * ffn (norm2(x) * (1 + scale_f) + shift_f)      ffn: dense or mixture of experts

The functions need only this layout, so that a test's toy model with the same submodule names works too.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moeca_fx.zoo import DiTMoE
from moeca_fx.zoo.layers import unpatchify


def embed(model: Any, x: Tensor) -> Tensor:
    """Image [B, C, S, S] -> the tokens [B, T, H] that enter the first block."""
    tokens: Tensor = model.x_embedder(x)
    return tokens + model.pos_embed if isinstance(model, DiTMoE) else tokens


def condition_of(model: Any, t: Tensor, y: Tensor) -> Tensor:
    """Timesteps [B] and labels [B] -> the condition [B, H] of every adaLN."""
    condition: Tensor = model.t_embedder(t) + model.y_embedder(y)
    return condition


def run_blocks(model: Any, tokens: Tensor, condition: Tensor, first: int, end: int) -> Tensor:
    """Tokens [B, T, H] through the blocks `first` .. `end` - 1, as the model runs them."""
    for index in range(first, end):
        tokens = model.blocks[index](tokens, condition)
    return tokens


def finish(model: Any, tokens: Tensor, condition: Tensor) -> Tensor:
    """The last block's tokens [B, T, H] -> prediction [B, C', S, S]: final layer under `condition`, unpatchify."""
    patches = model.final_layer(tokens, condition)
    return unpatchify(patches, model.config.patch_size, model.config.out_channels)


@dataclass(frozen=True)
class Modulation:
    """The six adaLN vectors of one block, each [B, 1, H]."""

    shift_attention: Tensor
    scale_attention: Tensor
    gate_attention: Tensor
    shift_ffn: Tensor
    scale_ffn: Tensor
    gate_ffn: Tensor


def modulation(block: nn.Module, condition: Tensor) -> Modulation:
    """The block's adaLN vectors for the condition [B, H]."""
    vectors = block.get_submodule("adaLN_modulation")(condition)  # [B, 6 H]
    return Modulation(*(vector.unsqueeze(1) for vector in vectors.chunk(6, dim=1)))


def attention_input(block: nn.Module, tokens: Tensor, vectors: Modulation) -> Tensor:
    """What the block's attention sees: normalised, modulated tokens [B, T, H]."""
    normalised: Tensor = block.get_submodule("norm1")(tokens)
    return normalised * (1 + vectors.scale_attention) + vectors.shift_attention


def ffn_input(block: nn.Module, tokens: Tensor, vectors: Modulation) -> Tensor:
    """What the block's feed-forward sees: normalised, modulated tokens [B, T, H]."""
    normalised: Tensor = block.get_submodule("norm2")(tokens)
    return normalised * (1 + vectors.scale_ffn) + vectors.shift_ffn


def attention(block: nn.Module, inputs: Tensor) -> Tensor:
    """The attention's output [B, T, H] before its gate."""
    output: Tensor = block.get_submodule("attn")(inputs)
    return output


def ffn(block: nn.Module, inputs: Tensor) -> Tensor:
    """The feed-forward's output [B, T, H] before its gate; row-wise, so `inputs` may hold any rows of a sample."""
    children = dict(block.named_children())
    output: Tensor = children["moe" if "moe" in children else "mlp"](inputs)
    return output
