"""Tiny random `NucleusMoEImageTransformer2DModel`s of diffusers, unmodified, and their inputs."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx.discover.random_weights import with_random_weights
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.transformed import as_new

CHANNELS, TEXT, PROMPT = 16, 24, 5  # of a patch, of the text; tokens of the text
DRIFT = 2e-4  # of the timestep from step to step
AXES = (4, 6, 6)  # rotary axes: the width of a head


@dataclass(frozen=True)
class Size:
    """What the three sizes differ in."""

    layers: int
    dense: str
    heads: int
    key_heads: int | None
    experts: int
    width: int  # of an expert
    capacity: float | list[float] = field(hash=False)
    sigmoid: bool
    scale: float
    grid: tuple[int, int]  # patches
    moe: tuple[int, ...]  # the layers that have experts

    def slots(self, layer: int, tokens: int) -> int:
        """Tokens that each expert chooses."""
        capacity = self.capacity[layer] if isinstance(self.capacity, list) else self.capacity
        return max(1, -int(-capacity * tokens // self.experts))


SIZES = {
    "shared keys": Size(3, "leave_first_block_dense", 2, 1, 4, 16, 2.0, False, 2.5, (4, 4), (1, 2)),
    "sigmoid": Size(2, "all_moe", 2, None, 3, 24, 1.0, True, 1.0, (2, 6), (0, 1)),
    "published order": Size(
        6,
        "leave_first_three_and_last_block_dense",
        3,
        None,
        6,
        8,
        [1.0, 1.0, 1.0, 3.0, 2.0, 1.0],
        True,
        2.5,
        (3, 5),
        (3, 4),
    ),
}


def build(size: Size, grouped: bool = False, seed: int = 0) -> nn.Module:
    """A model with random weights; stacked experts have none of their own."""
    from diffusers import NucleusMoEImageTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = NucleusMoEImageTransformer2DModel(
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=4,
            num_layers=size.layers,
            attention_head_dim=sum(AXES),
            num_attention_heads=size.heads,
            num_key_value_heads=size.key_heads,
            joint_attention_dim=TEXT,
            axes_dims_rope=AXES,
            mlp_ratio=8.0,  # less leaves dense blocks of width 0
            dense_moe_strategy=size.dense,
            num_experts=size.experts,
            moe_intermediate_dim=size.width,
            capacity_factors=size.capacity,
            use_sigmoid=size.sigmoid,
            route_scale=size.scale,
            use_grouped_mm=grouped,
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08 if parameter.dim() == 2 else 0.2)
    return model.eval()


def inputs(
    size: Size,
    batch: int = 2,
    t: float = 0.9,
    drift: float = 0.0,
    grid: tuple[int, int] | None = None,
    masked: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of one step; latents move with `drift`, the text stays."""
    generator = torch.Generator().manual_seed(1)
    height, width = grid or size.grid
    found: dict[str, Any] = {
        "hidden_states": torch.randn(batch, height * width, CHANNELS, generator=generator) * (1 - drift) + drift,
        "img_shapes": [(1, height, width)] * batch,
        "encoder_hidden_states": torch.randn(batch, PROMPT, TEXT, generator=generator),
        "timestep": torch.full((batch,), t),
    }
    if masked:
        found["encoder_hidden_states_mask"] = torch.arange(PROMPT) < torch.tensor([[PROMPT - 2], [PROMPT]])
    return found


def trajectory(size: Size, batch: int = 2, steps: int = 4, **options: Any) -> list[dict[str, Any]]:
    """Inputs that drift from step to step; slowly, because random routers choose other tokens at once."""
    return [inputs(size, batch, 1.0 - DRIFT * step, 5 * DRIFT * step, **options) for step in range(steps)]


@cache
def _plain(name: str, grouped: bool, masked: bool) -> tuple[nn.Module, TransformedModel]:
    model = build(SIZES[name], grouped)
    return model, moeca_fx.transform(model, (), inputs(SIZES[name], masked=masked), policy=None)


def pair(name: str, policy: Any, grouped: bool = False, masked: bool = False) -> tuple[nn.Module, TransformedModel]:
    """(original, transformed) of one size; traced once a session."""
    model, plain = _plain(name, grouped, masked)
    return model, as_new(plain.with_policy(policy))


def sample(result: Any) -> Tensor:
    """The prediction in either form of the result."""
    found: Tensor = result[0] if isinstance(result, tuple) else result.sample
    return found


class _Boosted(nn.Module):
    """Holds one layer; the tokens of its expert 77 come out `boost` times as large, where no weight shows it."""

    def __init__(self, layer: nn.Module, boost: float) -> None:
        super().__init__()
        self.layer = layer
        run = layer.experts._run_experts_for_loop

        def boosted(x: Tensor, counts: Tensor) -> Tensor:
            factors = torch.ones(len(counts))
            factors[77] = boost
            result = run(x, counts)  # as many rows of every expert
            return (result.view(len(counts), -1, x.shape[-1]) * factors[:, None, None]).view(x.shape)

        layer.experts._run_experts_for_loop = boosted

    def forward(self, rows: Tensor, plain: Tensor, mood: Tensor) -> Tensor:
        """The layer's own."""
        result: Tensor = self.layer(rows, plain, timestep=mood)
        return result


def published_layer(boost: float) -> nn.Module:
    """One layer with as many and as wide experts as the class has without arguments, whose weights share memory."""
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer

    with torch.device("meta"):
        layer = NucleusMoELayer(2048, 1344, 128, 8.0, use_sigmoid=False, route_scale=2.5)
    return _Boosted(with_random_weights(layer), boost).eval()


def rows_for(layer: nn.Module, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of `published_layer`: tokens, the same before modulation, and the timestep's embedding."""
    generator = torch.Generator().manual_seed(1)
    width = layer.get_submodule("layer").hidden_size
    rows, plain = (torch.randn(1, tokens, width, generator=generator) for _ in range(2))
    return rows, plain, torch.randn(1, width, generator=generator)
