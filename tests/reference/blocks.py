"""The zoo's blocks taken apart for one sample: the same submodules, called one piece at a time.

Everything is unbatched: tokens are [T, H], a row is [H], the adaLN vectors are [H]. Attention is written out
row by row and head by head, so that a test against it is a test of partial attention too.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeca_fx.zoo.attention import Attention, PackedAttention, rotate
from moeca_fx.zoo.dit_moe import DiTMoE, DiTMoEBlock, SparseMoE
from moeca_fx.zoo.dsmoe import DSMoE, MoELayer


def embed(model: DSMoE | DiTMoE, image: Tensor) -> Tensor:
    """The tokens [T, H] that enter the first block, from one image [C, S, S]."""
    tokens: Tensor = model.x_embedder(image[None])[0]
    return tokens + model.pos_embed[0] if isinstance(model, DiTMoE) else tokens


@dataclass(frozen=True)
class Modulation:
    """The six adaLN vectors [H] of one block and one sample."""

    shift_attn: Tensor
    scale_attn: Tensor
    gate_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def modulation(block: nn.Module, condition: Tensor) -> Modulation:
    """The block's adaLN vectors for the condition [H]."""
    vectors = block.get_submodule("adaLN_modulation")(condition[None])[0]
    return Modulation(*vectors.chunk(6))


def attention_input(block: nn.Module, tokens: Tensor, vectors: Modulation) -> Tensor:
    """What the attention sees: normalised and modulated tokens [T, H]."""
    return _normalised(block, "norm1", tokens) * (1 + vectors.scale_attn) + vectors.shift_attn


def mlp_input(block: nn.Module, tokens: Tensor, vectors: Modulation) -> Tensor:
    """What the router, the experts or the dense FFN see [T, H]."""
    return _normalised(block, "norm2", tokens) * (1 + vectors.scale_mlp) + vectors.shift_mlp


def _normalised(block: nn.Module, name: str, tokens: Tensor) -> Tensor:
    normalised: Tensor = block.get_submodule(name)(tokens)
    return normalised


def queries_keys_values(block: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projected queries, keys and values, each [T, h, d], ready for the product (rotated or normalised)."""
    attn = block.get_submodule("attn")
    tokens = inputs.shape[0]
    if isinstance(attn, Attention):
        q, k, v = attn.qkv(inputs).reshape(tokens, 3, attn.num_heads, attn.head_dim).unbind(1)
        if attn.rotary:
            cos, sin = attn.rope_cos[:, None], attn.rope_sin[:, None]  # [T, 1, d]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v
    assert isinstance(attn, PackedAttention)
    q, k, v = attn.Wqkv(inputs).reshape(tokens, 3, attn.num_heads, attn.head_dim).unbind(1)
    return attn.q_norm(q), attn.k_norm(k), v


def attention_row(block: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One token's attention output [H], after the output projection and before the gate.

    Args:
        block: the transformer block.
        query: the token's query [h, d].
        key, value: keys and values of all tokens [T, h, d].
    """
    attn = block.get_submodule("attn")
    heads = []
    for head in range(query.shape[0]):
        logits = key[:, head] @ query[head] / math.sqrt(query.shape[1])  # [T]
        heads.append(torch.softmax(logits, dim=0) @ value[:, head])
    assert isinstance(attn, Attention | PackedAttention)
    out_projection = attn.proj if isinstance(attn, Attention) else attn.out_proj
    row: Tensor = out_projection(torch.cat(heads))
    return row


@dataclass(frozen=True)
class MoEParts:
    """Router, experts and shared expert of one MoE layer."""

    layer: nn.Module
    experts: list[nn.Module]
    shared: nn.Module

    def route(self, inputs: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """Experts [T][k] and the router's own weights [T][k] of the rows [T, H]."""
        if isinstance(self.layer, MoELayer):
            ids, weights = self.layer.route(self.layer.gate(inputs))
        else:
            assert isinstance(self.layer, SparseMoE)
            ids, weights = self.layer.gate(inputs)
        return ids.tolist(), weights.tolist()

    def expert(self, index: int, row: Tensor) -> Tensor:
        """The output [H] of one expert for one row [H]: one branch."""
        output: Tensor = self.experts[index](row[None])
        return output[0]

    def shared_row(self, row: Tensor) -> Tensor:
        """The shared expert's output [H] for one row [H]."""
        output: Tensor = self.shared(row[None])
        return output[0]


def moe_parts(block: nn.Module) -> MoEParts | None:
    """The block's MoE layer, or None when its feed-forward is dense."""
    layer = block.get_submodule("moe" if isinstance(block, DiTMoEBlock) else "mlp")
    if isinstance(layer, SparseMoE):
        return MoEParts(layer, list(layer.experts), layer.shared_experts)
    if isinstance(layer, MoELayer):
        return MoEParts(layer, list(layer.experts.blocks), layer.shared_experts)
    return None


def dense_row(block: nn.Module, row: Tensor) -> Tensor:
    """The dense FFN's output [H] for one row [H], before the gate."""
    output: Tensor = block.get_submodule("mlp")(row[None])
    return output[0]
