"""moeca::attention_rows against dense attention and a plain loop, torch's own op checks, and its FLOP formula."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moeca_fx.ops import attention_rows

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROWS = {
    "every row": list(range(15)),
    "none of sample 1": [0, 3, 4, 12],
    "one": [7],
    "uneven": [0, 1, 2, 3, 4, 9, 10, 11],
}


def _case(
    dtype: torch.dtype, row: list[int], heads: int = 4, kv_heads: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dense queries [3, 5, h, d], keys, values (wider), the picked queries [M, h, d] and their rows."""
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(3, 5, heads, 8, generator=generator).to(dtype)
    key = torch.randn(3, 5, kv_heads, 8, generator=generator).to(dtype)
    value = torch.randn(3, 5, kv_heads, 6, generator=generator).to(dtype)
    index = torch.tensor(row, dtype=torch.int64)
    return dense, key, value, dense.flatten(0, 1)[index], index


def _one_query_at_a_time(query: Tensor, key: Tensor, value: Tensor, row: Tensor, scale: float | None) -> Tensor:
    group = query.shape[1] // key.shape[2]
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out = torch.empty(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    for index, flat in enumerate(row.tolist()):
        sample = flat // key.shape[1]
        for head in range(query.shape[1]):
            keys, values = key[sample, :, head // group].double(), value[sample, :, head // group].double()
            out[index, head] = ((keys @ query[index, head].double()) * factor).softmax(0) @ values
    return out


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_one_query_at_a_time(row: list[int], dtype: torch.dtype) -> None:
    _, key, value, query, index = _case(dtype, row)
    found = attention_rows(query, key, value, index, None)
    assert found.dtype == dtype and found.shape == (len(row), 4, 6)
    expected = _one_query_at_a_time(query, key, value, index, None)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_heads_and_scale_equal_dense_attention(kv_heads: int, scale: float | None) -> None:
    dense, key, value, query, index = _case(torch.float64, [1, 2, 6, 13], kv_heads=kv_heads)
    found = attention_rows(query, key, value, index, scale)
    heads_first = (tensor.transpose(1, 2) for tensor in (dense, key, value))
    expected = functional.scaled_dot_product_attention(*heads_first, scale=scale, enable_gqa=kv_heads != 4)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(0, 1)[index])
    torch.testing.assert_close(found, _one_query_at_a_time(query, key, value, index, scale))


def test_no_rows() -> None:
    _, key, value, query, index = _case(torch.float32, [])
    assert attention_rows(query, key, value, index, None).shape == (0, 4, 6)


@pytest.mark.parametrize("row", [[1, 2, 6, 13], []], ids=["rows", "no rows"])
def test_opcheck(row: list[int]) -> None:
    _, key, value, query, index = _case(torch.float32, row, kv_heads=2)
    torch.library.opcheck(torch.ops.moeca.attention_rows.default, (query, key, value, index, None))


@pytest.mark.parametrize(("row", "widest"), [([0, 3, 4, 12], 3), ([7], 1), ([], 0), (list(range(15)), 5)])
def test_flops_count_the_padded_rows_that_run(row: list[int], widest: int) -> None:
    _, key, value, query, index = _case(torch.float32, row)
    with FlopCounterMode(display=False) as counter:
        attention_rows(query, key, value, index, None)
    assert counter.get_total_flops() == 2 * (3 * widest) * 5 * 4 * (8 + 6)
