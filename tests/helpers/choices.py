"""Hypothesis strategies for routings in which experts choose tokens."""

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Two choices of one batch, (now [B, E, C], cached [B, E, C], T); the tokens of a row differ."""
    tokens = draw(st.integers(1, 9))
    capacity = draw(st.integers(1, tokens))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    rows = shape[0] * shape[1]
    orders = st.lists(st.permutations(range(tokens)), min_size=rows, max_size=rows)
    now, cached = (
        torch.tensor([order[:capacity] for order in draw(orders)]).reshape(*shape, capacity) for _ in range(2)
    )
    return now, cached, tokens


def numbers(like: Tensor, seed: int) -> Tensor:
    """Positive fp64 numbers of a shape."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
