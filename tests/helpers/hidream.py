"""Tiny random `HiDreamImageTransformer2DModel`s of diffusers, unmodified, and their inputs."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.transformed import as_new

CHANNELS, T5, LLAMA, POOLED = 4, 24, 20, 12


@dataclass(frozen=True)
class Size:
    """What the three sizes differ in; `axes` are the rotary axes, whose sum is the width of a head."""

    doubles: int
    singles: int
    heads: int
    axes: tuple[int, int, int]
    experts: int
    top_k: int
    grid: tuple[int, int] = (8, 8)  # of the latents

    @property
    def layers(self) -> int:
        """Text layers that it reads."""
        return self.doubles + self.singles


SIZES = {
    "square": Size(1, 1, 2, (8, 4, 4), 4, 2),
    "padded": Size(2, 1, 3, (4, 2, 2), 3, 2, grid=(4, 8)),  # latents that are not square are padded and masked
    "wide heads": Size(1, 2, 2, (4, 2, 2), 6, 3),  # rotary positions reach half of each head
}


def build(size: Size, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights."""
    from diffusers import HiDreamImageTransformer2DModel

    torch.manual_seed(0)
    width = 2 * sum(size.axes) if size is SIZES["wide heads"] else sum(size.axes)
    model: nn.Module = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        num_layers=size.doubles,
        num_single_layers=size.singles,
        attention_head_dim=width,
        num_attention_heads=size.heads,
        caption_channels=[T5, LLAMA],
        text_emb_dim=POOLED,
        num_routed_experts=size.experts,
        num_activated_experts=size.top_k,
        axes_dims_rope=size.axes,
        max_resolution=(8, 8),
        llama_layers=list(range(size.layers)),
    )
    return model.eval().to(dtype)


def inputs(size: Size, batch: int = 2, t: float = 900.0, drift: float = 0.0, seed: int = 1) -> dict[str, Tensor]:
    """Keyword arguments of one step; latents move with `drift`, the text stays."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": normal(batch, CHANNELS, *size.grid) * (1 - drift) + drift,
        "timesteps": torch.full((batch,), t),
        "encoder_hidden_states_t5": normal(batch, 5, T5),
        "encoder_hidden_states_llama3": normal(size.layers, batch, 6, LLAMA),
        "pooled_embeds": normal(batch, POOLED),
    }


def trajectory(size: Size, batch: int = 2, steps: int = 4) -> list[dict[str, Tensor]]:
    """Inputs that drift from step to step."""
    return [inputs(size, batch, 1000.0 - 100 * step, 0.02 * step) for step in range(steps)]


@cache
def _plain(name: str) -> tuple[nn.Module, TransformedModel]:
    model = build(SIZES[name])
    return model, moeca_fx.transform(model, (), inputs(SIZES[name]), policy=None)


def pair(name: str, policy: Any) -> tuple[nn.Module, TransformedModel]:
    """(original, transformed) of one size; traced once a session."""
    model, plain = _plain(name)
    return model, as_new(plain.with_policy(policy))


def sample(result: Any) -> Tensor:
    """The prediction in either form of the result."""
    found: Tensor = result[0] if isinstance(result, tuple) else result.sample
    return found
