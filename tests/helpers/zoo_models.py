"""Tiny members of every zoo family in fp32, with inputs on which every part of them does something."""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from moeca_fx.zoo import DiTMoE, DiTMoEConfig, DSMoE, DSMoEConfig, build, randomize_

Family = Literal["dsmoe", "dsmoe-groups", "ditmoe", "ditmoe-packed"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Inputs = tuple[Tensor, Tensor, Tensor]

TOKENS = 16
_DSMOE = DSMoEConfig(
    input_size=8,
    hidden_size=32,
    depth=2,
    num_heads=2,
    mlp_ratio=2.0,
    num_experts=6,
    top_k=3,
    expert_width=16,
    num_classes=10,
)
TINY_PIXELS = DSMoEConfig(
    input_size=8,
    patch_size=2,
    in_channels=1,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_experts=4,
    top_k=2,
    expert_width=8,
    num_classes=10,
    learn_sigma=False,
)
"""One image channel in and out, so that a sampler can use it; 4 experts, top-2."""
_DIT_MOE = DiTMoEConfig(input_size=8, hidden_size=32, depth=2, num_heads=2, mlp_ratio=1, num_experts=5, num_classes=10)


def tiny_dsmoe(depth: int = 2, groups: int = 1, seed: int = 0, **changes: int | float | bool) -> DSMoE:
    """A random DSMoE: even blocks dense, odd blocks MoE with 6 experts, top-3, 16 tokens, width 32."""
    fields = {**vars(_DSMOE), "depth": depth, "n_group": groups, "topk_group": groups, **changes}
    model = DSMoE(DSMoEConfig(**fields))
    randomize_(model, seed)
    return model.eval()


def tiny_ditmoe(packed: bool = False, depth: int = 2, seed: int = 0) -> DiTMoE:
    """A random DiT-MoE: every block MoE with 5 experts, top-2; 16 tokens, width 32."""
    model = DiTMoE(DiTMoEConfig(**{**vars(_DIT_MOE), "packed_attention": packed, "depth": depth}))
    randomize_(model, seed)
    return model.eval()


def tiny(family: Family, seed: int = 0) -> DSMoE | DiTMoE:
    """One model of a family, depth 2."""
    if family.startswith("dsmoe"):
        return tiny_dsmoe(groups=2 if family == "dsmoe-groups" else 1, seed=seed)
    return tiny_ditmoe(packed=family == "ditmoe-packed", seed=seed)


def shallow_digits() -> DSMoE:
    """The trained digits model with its first two blocks alone, one dense and one MoE: it costs a third."""
    model = build("digits")
    assert isinstance(model, DSMoE)
    model.blocks = model.blocks[:2].eval()  # the list is a new module
    return model


def inputs(batch: int = 2, seed: int = 0, t: float = 0.0, dtype: torch.dtype = torch.float32) -> Inputs:
    """x [B, 4, 8, 8], t [B], y [B]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator).to(dtype)
    y = torch.randint(0, 10, (batch,), generator=generator)
    return x, torch.full((batch,), t, dtype=dtype), y


def trajectory(
    batch: int = 2, steps: int = 6, drift: float = 0.2, seed: int = 0, tick: float = 0.02
) -> Iterator[Inputs]:
    """Inputs of each step; x drifts at a speed of its own for every sample, t grows by `tick`."""
    generator = torch.Generator().manual_seed(seed)
    x, _, y = inputs(batch, seed)
    speed = torch.linspace(0.5, 1.5, batch)[:, None, None, None]
    for step in range(steps):
        yield x, torch.full((batch,), step * tick), y
        x = x + drift * speed * torch.randn(x.shape, generator=generator)


def prediction(result: object) -> Tensor:
    """The prediction of a model of any family: its result, or item 0 of it."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).double().abs().max() / expected.double().abs().max())
