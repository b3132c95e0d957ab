"""Patch embeddings as linears: equal values, any batch, and what is left alone."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from moeca_fx.passes.patch_linear import patch_linear

aten = torch.ops.aten


def _captured(conv: nn.Conv2d, shape: tuple[int, ...]) -> torch.fx.GraphModule:
    batch = Dim("batch", min=1, max=64)
    return export(conv, (torch.randn(shape),), dynamic_shapes=({0: batch},)).module()


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_values_for_any_batch(patch: tuple[int, int], bias: bool) -> None:
    conv = nn.Conv2d(3, 10, patch, stride=patch, bias=bias)
    module = _captured(conv, (2, 3, 8, 12))
    assert patch_linear(module) == 1
    assert not module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 12)
        torch.testing.assert_close(module(x), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 6, 3, stride=1, padding=1),
        nn.Conv2d(3, 6, 2, stride=1),
        nn.Conv2d(3, 6, 2, stride=2, padding=1),
        nn.Conv2d(3, 6, 2, stride=2, groups=3),
        nn.Conv2d(3, 6, 2, stride=2, dilation=2),
        nn.Conv2d(3, 6, 3, stride=3),
    ],
    ids=["overlaps", "slides", "padded", "grouped", "dilated", "leaves a rest"],
)
def test_other_convolutions_stay(conv: nn.Conv2d) -> None:
    module = _captured(conv, (2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    before = module(x)
    assert patch_linear(module) == 0
    assert torch.equal(module(x), before)
