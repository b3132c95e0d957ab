"""`moeca::experts`: the marker that stands for a whole routed-experts region while a model is captured.

The published expert loops cannot be traced (`.nonzero()`, `.cpu().numpy()`), so capture replaces each proven region by
this one op. Its body runs the original region, which makes the captured graph runnable, and comparable bit for bit,
before anything is lowered. `vectorize_experts` replaces it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

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
