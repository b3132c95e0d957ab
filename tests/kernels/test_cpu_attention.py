"""Attention on a CPU, of all tokens and of some rows, against torch's and the reference."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops import attention_rows
from moeca_fx.timing import pinned_threads

pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
ops = torch.ops.moeca_cpu


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2


def _expected(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    doubles = (part.double() for part in (query, key, value))
    return functional.scaled_dot_product_attention(*doubles, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (7, 7), (64, 64), (150, 150), (20, 33), (3, 90)])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), [(4, 4, 32, 32), (6, 2, 20, 13)])
def test_all_tokens(
    dtype: torch.dtype, queries: int, tokens: int, heads: int, kv_heads: int, width: int, value_width: int
) -> None:
    query = torch.randn(2, queries, heads, width).to(dtype).transpose(1, 2)
    key = torch.randn(2, tokens, kv_heads, width).to(dtype).transpose(1, 2)
    value = torch.randn(2, kv_heads, tokens, value_width).to(dtype)
    for scale in (None, 0.3):
        found = ops.attention(query, key, value, scale)
        assert found.transpose(1, 2).is_contiguous()  # as torch's: merging the heads afterwards copies nothing
        torch.testing.assert_close(
            found.double(), _expected(query, key, value, scale), rtol=_tolerance(dtype), atol=_tolerance(dtype)
        )


def test_heads_that_are_parts_of_one_projection() -> None:
    query, key, value = torch.randn(2, 40, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
    expected = _expected(query, key, value).float()
    torch.testing.assert_close(ops.attention(query, key, value, None), expected, rtol=1e-5, atol=1e-5)


def test_widths_that_are_strided() -> None:
    query, key, value = (torch.randn(2, 4, 16, 40).transpose(2, 3) for _ in range(3))
    expected = _expected(query, key, value).float()
    torch.testing.assert_close(ops.attention(query, key, value, None), expected, rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = (torch.randn(1, 2, rows, 16) for rows in (4, 30, 30))
    found = ops.attention(query * 1e4, key, value, None)
    torch.testing.assert_close(found.double(), _expected(query * 1e4, key, value))


def test_operands_that_do_not_fit() -> None:
    one = torch.randn(1, 2, 5, 8)
    for key, value in ((one[:, :, :3], one), (one[..., :4], one), (one.double(), one)):
        with pytest.raises(RuntimeError, match="do not fit each other"):
            ops.attention(one, key, value, None)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (0, 5, 3, 8), (2, 0, 3, 8)], ids=str)
def test_shapes_of_fake_tensors(shape: tuple[int, ...]) -> None:
    query, key = torch.randn(shape).transpose(1, 2), torch.randn(shape[0], 7, *shape[2:]).transpose(1, 2)
    torch.library.opcheck(ops.attention.default, (query, key, key, None), test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shares", [(0.0, 0.05), (0.5, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), [(4, 4, 32, 32), (6, 2, 20, 13)])
def test_attention_rows(
    dtype: torch.dtype, shares: tuple[float, float], heads: int, kv_heads: int, width: int, value_width: int
) -> None:
    tokens = 70
    row = torch.cat([torch.arange(round(s * tokens)) + sample * tokens for sample, s in enumerate(shares)])
    query = torch.randn(len(row), heads, width).to(dtype)
    key, value = (
        torch.randn(2, tokens, kv_heads, width).to(dtype),
        torch.randn(2, tokens, kv_heads, value_width).to(dtype),
    )
    for scale in (None, 0.3):
        expected = attention_rows(query.double(), key.double(), value.double(), row, scale)
        found = ops.attention_rows(query, key, value, row, scale)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_attention_of_no_rows() -> None:
    empty = ops.attention_rows(
        torch.randn(0, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 6), torch.empty(0, dtype=torch.int64), None
    )
    assert empty.shape == (0, 2, 6)


@pytest.fixture(params=[1, 2, 5])
def some_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """With few threads there are samples enough for one to take all heads of a row."""
    with pinned_threads(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 37, 3])
@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens first", "heads first"])
@pytest.mark.usefixtures("some_threads")
def test_few_rows_of_every_sample(dtype: torch.dtype, tokens: int, heads_first: bool) -> None:
    counts = [min(count, tokens) for count in range(10)]  # one sample each
    row = torch.cat([torch.arange(count) + sample * tokens for sample, count in enumerate(counts)])
    query = torch.randn(len(row), 2, 20).to(dtype)
    key, value = torch.randn(10, tokens, 2, 20).to(dtype), torch.randn(10, tokens, 2, 48).to(dtype)
    if heads_first:
        key, value = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (key, value))
    expected = attention_rows(query.double(), key.double(), value.double(), row, None)
    found = ops.attention_rows(query, key, value, row, None)
    torch.testing.assert_close(found.double(), expected, rtol=_tolerance(dtype), atol=_tolerance(dtype))


@pytest.mark.parametrize(("tokens", "value_width"), [(64, 32), (37, 48), (3, 16), (40, 13)])
@pytest.mark.usefixtures("some_threads")
def test_keys_and_values_in_bf16_beside_queries_in_fp32(tokens: int, value_width: int) -> None:
    counts = [min(count, tokens) for count in range(12)]  # of a sample: none, those of every kernel, and more
    row = torch.cat([torch.arange(count) + sample * tokens for sample, count in enumerate(counts)])
    query = torch.randn(len(row), 2, 20)
    key, value = torch.randn(12, tokens, 2, 20).bfloat16(), torch.randn(12, tokens, 2, value_width).bfloat16()
    found = ops.attention_rows(query, key, value, row, None)
    assert found.dtype == torch.float32
    expected = ops.attention_rows(query, key.float(), value.float(), row, None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="do not fit each other"):
        ops.attention_rows(query.bfloat16(), key.float(), value.float(), row, None)
    with pytest.raises(RuntimeError, match="do not fit each other"):
        ops.attention_rows(query, key, value.float(), row, None)
