"""A denoiser with the zoo's module layout whose every part is a function that a test can follow by hand.

Width 1, patch 1, one channel: an image [B, 1, S, S] is S * S tokens, and the condition is the timestep itself.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


def constant(value: float) -> Function:
    return lambda t: torch.full_like(t, value)


ONE = constant(1.0)


class Apply(nn.Module):
    """A function as a module; counts the rows it was given."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.rows = 0

    def forward(self, z: Tensor) -> Tensor:
        self.rows += z[..., 0].numel()
        return self.function(z)


class Six(nn.Module):
    """adaLN: the timestep [B, 1] -> shift, scale, gate of attention and of feed-forward, [B, 6]."""

    def __init__(self, functions: tuple[Function, ...]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, condition: Tensor) -> Tensor:
        return torch.cat([function(condition) for function in self.functions], dim=1)


class HandBlock(nn.Module):
    """x + gate_a(t) * attn(norm(x) + shift_a(t)), then + gate_f(t) * ffn(norm(x) + shift_f(t)).

    With `blind` (the default) the norms return 0, so that without an `attn` or `ffn` of their own the sublayers are
    shift_a(t) and shift_f(t) whatever the tokens are; else the norms return the tokens.
    """

    def __init__(
        self,
        shift_a: Function,
        shift_f: Function,
        gate_a: Function = ONE,
        gate_f: Function = ONE,
        attn: Function = lambda z: z,
        ffn: Function = lambda z: z,
        blind: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = self.norm2 = Apply(torch.zeros_like if blind else (lambda z: z))
        self.adaLN_modulation = Six((shift_a, constant(0.0), gate_a, shift_f, constant(0.0), gate_f))
        self.attn, self.mlp = Apply(attn), Apply(ffn)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, -1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        out: Tensor = x + gate_f * self.mlp(self.norm2(x) * (1 + scale_f) + shift_f)
        return out


class Final(nn.Module):
    """tokens + weight * condition."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return tokens + self.weight * condition.unsqueeze(1)


class HandModel(nn.Module):
    """x [B, 1, S, S], t [B], y [B] -> [B, 1, S, S]: the blocks, then + final * t."""

    def __init__(self, *blocks: HandBlock, final: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=1, out_channels=1)
        self.x_embedder = Apply(lambda x: x.flatten(2).transpose(1, 2))
        self.t_embedder = Apply(lambda t: t.unsqueeze(1))
        self.y_embedder = Apply(lambda y: torch.zeros(y.shape[0], 1, dtype=torch.float64))
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = Final(final)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x)
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        out: Tensor = self.final_layer(tokens, condition)
        return out.transpose(1, 2).reshape(x.shape)


def inputs(t: float, *tokens: float) -> tuple[Tensor, Tensor, Tensor]:
    """One sample with these tokens (a square number of them) at timestep t."""
    side = round(len(tokens) ** 0.5)
    image = torch.tensor(tokens, dtype=torch.float64).view(1, 1, side, side)
    return image, torch.tensor([t], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
