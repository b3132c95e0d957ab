"""Attention of selected rows against dense attention in fp64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moeca_fx import ops

pytest.importorskip("triton", reason="triton is not installed")
from moeca_fx.kernels.triton_gpu import attention_rows_masked, attention_rows_packed, listed_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHARES = {"none": 0.0, "some": 0.4, "all": 1.0}


def _case(
    share: float, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 4), sizes: tuple[int, int] = (24, 16)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of 3 samples of 37 tokens and a mask, in which sample 1 has no row unless all have."""
    generator = torch.Generator().manual_seed(5)

    def normal(count: int, size: int) -> Tensor:
        return torch.randn(3, 37, count, size, generator=generator).to(dtype).to(DEVICE)

    mask = torch.rand(3, 37, generator=generator) < share
    mask[1] &= share == 1
    return normal(heads[0], sizes[0]), normal(heads[1], sizes[0]), normal(heads[1], sizes[1]), mask.to(DEVICE)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    heads_first = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(*heads_first, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
def test_selected_rows_equal_dense_attention(share: float, dtype: torch.dtype) -> None:
    query, key, value, mask = _case(share, dtype)
    mark = torch.full((3, 37, 4, 16), -7.0, dtype=dtype, device=DEVICE)
    found = attention_rows_masked(query, key, value, mask, out=mark)
    expected, tolerance = _dense(query, key, value, None), TOLERANCE[dtype]
    torch.testing.assert_close(found[mask].double(), expected[mask], rtol=tolerance, atol=tolerance)
    assert found is mark and (found[~mask] == -7).all()


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (2, 2)])
def test_grouped_heads_scale_and_odd_widths(heads: tuple[int, int], scale: float | None) -> None:
    query, key, value, mask = _case(0.4, heads=heads, sizes=(9, 20))
    expected = _dense(query, key, value, scale)
    found = attention_rows_masked(query, key, value, mask, scale)
    torch.testing.assert_close(found[mask].double(), expected[mask], rtol=2e-6, atol=2e-6)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
def test_packed_queries_equal_the_reference(share: float) -> None:
    query, key, value, mask = _case(share, heads=(4, 2))
    row = torch.nonzero(mask.flatten()).squeeze(1)
    picked = query.flatten(0, 1)[row]
    found = attention_rows_packed(picked, key, value, row)
    torch.testing.assert_close(found, ops.attention_rows(picked, key, value, row, None), rtol=1e-5, atol=1e-5)


def test_views_of_one_projection() -> None:
    projected = torch.randn(2, 20, 3, 4, 16, device=DEVICE)
    query, key, value = projected.unbind(2)
    mask = torch.rand(2, 20, device=DEVICE) < 0.5
    found = attention_rows_masked(query, key, value, mask)
    expected = _dense(query, key, value, None)
    torch.testing.assert_close(found[mask].double(), expected[mask], rtol=2e-6, atol=2e-6)


def test_listed_rows() -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool, device=DEVICE)
    rows, bounds = listed_rows(mask)
    assert bounds.tolist() == [[0, 3, 6], [2, 3, 8]]
    assert [rows[0].item(), rows[1].item(), rows[6].item(), rows[7].item()] == [1, 2, 6, 8]
