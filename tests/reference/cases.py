"""Tiny random zoo models and drifting inputs on which every rule of the method has something to do."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from moeca_fx.zoo import DiTMoE, DiTMoEConfig, DSMoE, DSMoEConfig, randomize_


@dataclass(frozen=True)
class ReferenceConfig:
    """The fields of a MoECa config with the paper's defaults, for runs of the reference alone."""

    tau0: float = 0.8
    alpha: float = 0.6
    beta: float = 0.65
    lambda1: float = 1.1
    lambda2: float = 0.6
    score_weight: str = "share"
    entropy_norm: str = "minmax"
    attention: str = "synchronized"
    dense_ffn: str = "inherit"
    shared_expert: str = "inherit"


Family = Literal["dsmoe", "ditmoe", "ditmoe-packed"]
FAMILIES: tuple[Family, ...] = get_args(Family)


def tiny_model(family: Family, seed: int = 0) -> DSMoE | DiTMoE:
    """A random float64 model of width 32 with 16 tokens, gates not zero; "packed" has query and key norms."""
    model = DSMoE(_DSMOE) if family == "dsmoe" else DiTMoE(_PACKED if family == "ditmoe-packed" else _DIT_MOE)
    randomize_(model, seed)
    return model.double().eval().requires_grad_(False)


_DSMOE = DSMoEConfig(
    input_size=8,
    hidden_size=32,
    depth=4,
    num_heads=2,
    mlp_ratio=2.0,
    num_experts=6,
    top_k=3,
    expert_width=16,
    num_classes=10,
)
_DIT_MOE = DiTMoEConfig(input_size=8, hidden_size=32, depth=3, num_heads=2, mlp_ratio=1, num_experts=5, num_classes=10)
_PACKED = replace(_DIT_MOE, packed_attention=True)


def trajectory(
    batch: int, steps: int, drift: float, tick: float = 0.02, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs (x [B, 4, 8, 8], t [B], y [B]) of each step: x drifts by `drift`, t grows by `tick` from 0.

    Every sample has its own label and its own speed, so that the samples of a batch decide differently.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 10, (batch,), generator=generator)
    speed = torch.linspace(0.5, 1.5, batch, dtype=torch.float64)[:, None, None, None]
    for j in range(steps):
        yield x.clone(), torch.full((batch,), j * tick, dtype=torch.float64), y
        x = x + drift * speed * torch.randn(x.shape, generator=generator, dtype=torch.float64)
