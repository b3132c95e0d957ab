"""The combination of cached features against `ops.dispatch.combine_slots` and fp64."""

import pytest
import torch
from torch import Tensor

from moeca_fx.ops import dispatch

pytest.importorskip("triton", reason="triton is not installed")
from moeca_fx.kernels.triton_gpu import combine_slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _case(width: int, top_k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    feature = torch.randn(2, 7, top_k, width, generator=generator).to(dtype)
    return feature.to(DEVICE), torch.rand(2, 7, top_k, generator=generator).to(DEVICE)


def _exact(feature: Tensor, weight: Tensor) -> Tensor:
    return (feature.double() * weight.double().unsqueeze(-1)).sum(2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("width", "top_k"), [(64, 5), (115, 1), (600, 2)])
def test_equals_the_reference(width: int, top_k: int, dtype: torch.dtype) -> None:
    feature, weight = _case(width, top_k, dtype)
    found = combine_slots(feature, weight)
    assert found.dtype == dtype
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found, dispatch.combine_slots(feature, weight), **tolerance)
    torch.testing.assert_close(found.double(), _exact(feature, weight), **tolerance)


def test_weights_of_lower_precision_and_a_wider_result() -> None:
    feature, weight = _case(64, 5, torch.bfloat16)
    found = combine_slots(feature, weight.bfloat16(), dtype=torch.float32)
    torch.testing.assert_close(found.double(), _exact(feature, weight.bfloat16()), rtol=1e-6, atol=1e-6)


def test_features_of_eight_bits_with_a_scale() -> None:
    feature, weight = _case(115, 5)
    scale = feature.abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max
    stored = (feature / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
    found = combine_slots(stored, weight, scale)
    expected = _exact(stored.double() * scale.double().unsqueeze(-1), weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    feature, weight = _case(64, 5)
    assert combine_slots(feature[:0], weight[:0]).shape == (0, 7, 64)
