"""How a call is cut where shapes leave it open: by the model's own results for one and for two samples."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.runtime.sample_axes import cut, find_axes, plain_axes


class ReadsLayers(nn.Module):
    """Text of several layers [L, B, S, H], of which it reads the first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.mix(x) + text[0].reshape(x.shape[0], -1, 6).mean(1, keepdim=True)


class Mixes(ReadsLayers):
    """Every sample sees the others."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, text) + x.mean(0, keepdim=True)


def _call(layers: int, batch: int) -> tuple[list[Tensor], pytree.TreeSpec]:
    leaves, spec = pytree.tree_flatten(((torch.randn(batch, 5, 6), torch.randn(layers, batch, 3, 6)), {}))
    return leaves, spec


@pytest.mark.parametrize(("layers", "batch"), [(4, 4), (7, 4), (3, 3)])
def test_stacked_text(layers: int, batch: int) -> None:
    model = ReadsLayers().eval()
    leaves, spec = _call(layers, batch)
    with torch.no_grad():
        axes = find_axes(model, leaves, spec, batch)
        assert axes == (0, 1)
        parts = [model(*cut(leaves, axes, start, 1)) for start in range(batch)]
        torch.testing.assert_close(torch.cat(parts), model(*leaves))


def test_channels_as_many_as_samples() -> None:
    """The usual case: latents [4, 4, H, W]."""
    leaves, spec = pytree.tree_flatten(((torch.randn(4, 4, 5, 6),), {}))
    with torch.no_grad():
        assert find_axes(nn.Linear(6, 6), leaves, spec, 4) == (0,)


def test_one_sample_and_plain_shapes_run_nothing() -> None:
    for leaves, spec, batch in ((*_call(1, 1), 1), (*pytree.tree_flatten(((torch.randn(3, 6),), {})), 3)):
        assert find_axes(nn.Module(), leaves, spec, batch) == plain_axes(leaves, batch)


def test_samples_that_depend_on_each_other() -> None:
    leaves, spec = _call(4, 4)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="samples may depend on each other"):
        find_axes(Mixes().eval(), leaves, spec, 4)
