"""The markers that stand for a whole routed-experts region while a model is captured, one for each layout.

    moeca::experts(x, expert [.., k], weight [.., k], key)              tokens chose their experts
    moeca::expert_choice(x, token [B, E, C], weight [B, E, C], key)     experts chose their tokens

The published expert loops cannot be traced (`.nonzero()`, `.cpu().numpy()`), so capture replaces each proven region by
one such op. Its body runs the original region, which makes the captured graph runnable, and comparable bit for bit,
before anything is lowered. `vectorize_experts` replaces it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from moeca_fx.discover.records import Layout

Region = Callable[[Tensor, Tensor, Tensor], Tensor]
_live: dict[str, Region] = {}


@torch.library.custom_op("moeca::experts", mutates_args=())
def experts(x: Tensor, expert: Tensor, weight: Tensor, region: str) -> Tensor:
    """Run the routed experts of `region`: ``sum_k weight_k * expert_k(x)``.

    Args:
        x: [..., H] token rows.
        expert: expert ids, k a row, in the layout of the original region.
        weight: routing weights, k a row, in the layout of the original region.
        region: key of a region opened with `live_regions`.

    Returns:
        Same shape and dtype as `x`.
    """
    return _live[region](x, expert, weight).clone()


@experts.register_fake
def _(x: Tensor, expert: Tensor, weight: Tensor, region: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("moeca::expert_choice", mutates_args=())
def expert_choice(x: Tensor, token: Tensor, weight: Tensor, region: str) -> Tensor:
    """Run the routed experts of `region` on the tokens that each of them chose.

    ``y[b, t] = sum over (e, c) with token[b, e, c] == t of weight[b, e, c] * expert_e(x[b, t])``.

    Args:
        x: [B, T, H] or [B*T, H] token rows.
        token: [B, E, C] chosen tokens within the sample, distinct in a row.
        weight: [B, E, C] routing weights.
        region: key of a region opened with `live_regions`.

    Returns:
        Same shape and dtype as `x`.
    """
    return _live[region](x, token, weight).clone()


@expert_choice.register_fake
def _(x: Tensor, token: Tensor, weight: Tensor, region: str) -> Tensor:
    return torch.empty_like(x)


MARKERS: dict[Layout, Any] = {"token": experts._opoverload, "expert": expert_choice._opoverload}
"""The marker of each layout; all take (x, ids, weight, region)."""


def is_marker(node: fx.Node) -> bool:
    """Whether a node stands for a routed-experts region."""
    return node.target in MARKERS.values()


@contextmanager
def live_regions(regions: Mapping[str, Region]) -> Iterator[None]:
    """Make the original regions callable by their keys inside the block; keys must not be open already."""
    taken = _live.keys() & regions.keys()
    assert not taken, f"regions already open: {sorted(taken)}"
    _live.update(regions)
    try:
        yield
    finally:
        for key in regions:
            del _live[key]
