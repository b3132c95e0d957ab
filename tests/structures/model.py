"""`build`: a tiny diffusion transformer of a structure, in eval mode, with its inputs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structures.attentions import ATTENTIONS, Cross
from tests.structures.layer import layer_class
from tests.structures.structure import Structure

WIDTH, PATCH, CHANNELS, SIDE, TEXT, CLASSES = 24, 2, 4, 6, 5, 10
TOKENS = (SIDE // PATCH) ** 2
_TEXTUAL = ("joint", "cross")

Call = tuple[tuple[Any, ...], dict[str, Any]]


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """adaLN, attention, then the layer; `place` says who adds the residual."""

    def __init__(self, attention: str, layer: nn.Module, place: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn, self.ffn, self.place = ATTENTIONS[attention](WIDTH), layer, place
        self.cross = Cross(WIDTH) if attention == "cross" else None
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor, text: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, text)
        if self.cross is not None:
            x = x + self.cross(x, text)
        if self.place == "sub_block":
            out = self.ffn(x)
            return out[0] if isinstance(out, tuple) else out
        out = self.ffn(self.norm2(x) * (1 + scale2) + shift2)
        if isinstance(out, tuple):
            out, _auxiliary = out
        return x + gate2 * out if self.place == "gated" else x + out


class SubBlockFeedForward(FeedForward):
    """The dense layer of a model whose layers hold their own residual."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.norm(x))


class Transformer(nn.Module):
    """What the models of every structure share: embeddings of time and condition, blocks, a modulated last layer."""

    def __init__(self, structure: Structure, layer: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        layer = layer or layer_class(structure)
        dense = SubBlockFeedForward if structure.place == "sub_block" else FeedForward
        layers = [dense(WIDTH) if structure.depth == "first_dense" else layer(WIDTH), layer(WIDTH)]
        self.blocks = nn.ModuleList(Block(structure.attention, inner, structure.place) for inner in layers)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.last = nn.Linear(WIDTH, PATCH * PATCH * CHANNELS)

    def encode_time(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(100) * torch.arange(WIDTH // 2, device=t.device) / (WIDTH // 2))
        angles = t[:, None].float() * frequencies
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.last.weight.dtype))

    def denoise(self, x: Tensor, condition: Tensor, text: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, text)
        return self.last(F.layer_norm(x, (WIDTH,)))


class LatentTransformer(Transformer):
    """(x [B, C, h, w], t [B], y [B] or [B, S, H]) -> [B, C, h, w]."""

    def __init__(self, structure: Structure, layer: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__(structure, layer)
        self.patchify = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.label = nn.Linear(WIDTH, WIDTH) if structure.attention in _TEXTUAL else nn.Embedding(CLASSES, WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.patchify(x).flatten(2).transpose(1, 2) + self.position
        label = self.label(y)
        text = label if label.dim() == 3 else None
        condition = self.encode_time(t) + (label if text is None else text.mean(dim=1))
        out = self.denoise(tokens, condition, text).view(-1, SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, CHANNELS)
        return torch.einsum("bhwpqc->bchpwq", out).reshape(-1, CHANNELS, SIDE, SIDE)


class TokenTransformer(Transformer):
    """(hidden_states [B, T, C'], timestep [B], encoder_hidden_states [B, S, H]) -> ([B, T, C'],), called by keyword."""

    def __init__(self, structure: Structure, layer: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__(structure, layer)
        self.textual = structure.attention in _TEXTUAL
        self.embed = nn.Linear(PATCH * PATCH * CHANNELS, WIDTH)
        self.pos_embed = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.caption = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        text = self.caption(encoder_hidden_states)
        condition = self.encode_time(timestep) + text.mean(dim=1)
        tokens = self.embed(hidden_states) + self.pos_embed
        return (self.denoise(tokens, condition, text if self.textual else None),)


def build(
    structure: Structure, seed: int = 0, batch: int = 2, layer: Callable[[int], nn.Module] | None = None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A seeded model of a structure in eval mode, and arguments of one call; `layer(width)` replaces its MoE layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (LatentTransformer if structure.data == "latents" else TokenTransformer)(structure, layer)
        for block in model.blocks:
            nn.init.normal_(block.modulation[1].weight, std=0.3)  # a gate of zero would hide every mistake behind it
    args, kwargs = inputs(structure, batch, seed)
    return model.eval().requires_grad_(False), args, kwargs


def inputs(structure: Structure, batch: int = 2, seed: int = 0, t: float = 0.5) -> Call:
    """Arguments of one call at time `t`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    time = torch.full((batch,), t)
    text = torch.randn(batch, TEXT, WIDTH, generator=generator)
    if structure.data == "tokens":
        x = torch.randn(batch, TOKENS, PATCH * PATCH * CHANNELS, generator=generator)
        return (), {"hidden_states": x, "timestep": time, "encoder_hidden_states": text}
    x = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=generator)
    y = text if structure.attention in _TEXTUAL else torch.randint(0, CLASSES, (batch,), generator=generator)
    return (x, time, y), {}


def trajectory(structure: Structure, batch: int, steps: int, seed: int, drift: float = 0.05) -> list[Call]:
    """Arguments of consecutive steps: the sample drifts, time runs."""
    generator = torch.Generator().manual_seed(2000 + seed)
    args, kwargs = inputs(structure, batch, seed)
    calls: list[Call] = []
    for step in range(steps):
        time = torch.full((batch,), 0.5 + 0.02 * step)
        if args:
            calls.append(((args[0], time, args[2]), {}))
            args = (args[0] + drift * torch.randn(args[0].shape, generator=generator), *args[1:])
        else:
            calls.append(((), {**kwargs, "timestep": time}))
            x = kwargs["hidden_states"]
            kwargs = {**kwargs, "hidden_states": x + drift * torch.randn(x.shape, generator=generator)}
    return calls


def prediction(result: object) -> Tensor:
    """The tensor in a model's result."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found


def call(model: nn.Module, given: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Tensor:
    """One prediction."""
    with torch.no_grad():
        return prediction(model(*given[0], **given[1]))
