"""moeca::grouped_linear against a plain loop over rows, torch's own op checks, and its FLOP formula."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moeca_fx.ops import grouped_linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
SIZES = {"mixed": [3, 0, 4, 1], "all empty": [0, 0, 0, 0], "one group": [0, 0, 6, 0], "ends empty": [0, 2, 3, 0]}


def _case(sizes: list[int], dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 6, generator=generator).to(dtype)
    weight = torch.randn(len(sizes), 5, 6, generator=generator).to(dtype)
    added = torch.randn(len(sizes), 5, generator=generator).to(dtype) if bias else None
    return x, weight, added, torch.tensor(sizes).cumsum(0)


def _row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], weight.shape[1], dtype=torch.float64)
    for row in range(x.shape[0]):
        expert = next(e for e, end in enumerate(offsets.tolist()) if row < end)
        out[row] = weight[expert].double() @ x[row].double()
        if bias is not None:
            out[row] += bias[expert].double()
    return out


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_equals_a_loop_over_rows(sizes: list[int], dtype: torch.dtype, bias: bool) -> None:
    case = _case(sizes, dtype, bias)
    found = grouped_linear(*case)
    assert found.shape == (sum(sizes), 5) and found.dtype == dtype
    torch.testing.assert_close(found.double(), _row_by_row(*case), rtol=0, atol=TOLERANCE[dtype])


def test_takes_views_of_stacked_weights() -> None:
    x, weight, _, offsets = _case([3, 0, 4, 1], torch.float64, False)
    wide = torch.stack([weight, -weight], dim=1).flatten(1, 2)  # [E, 2 * 5, 6], every expert's first half is its own
    for view in (wide[:, :5], weight.transpose(1, 2).contiguous().transpose(1, 2)):
        assert not view.is_contiguous()
        torch.testing.assert_close(grouped_linear(x, view, None, offsets), grouped_linear(x, weight, None, offsets))


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], [0, 0, 0, 0]], ids=["rows", "no rows"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_opcheck(sizes: list[int], bias: bool) -> None:
    torch.library.opcheck(torch.ops.moeca.grouped_linear.default, _case(sizes, torch.float32, bias))


@pytest.mark.parametrize("rows", [0, 8])
def test_flops_are_two_for_a_multiply_add(rows: int) -> None:
    case = _case([rows, 0], torch.float32, True)
    with FlopCounterMode(display=False) as counter:
        grouped_linear(*case)
    assert counter.get_total_flops() == 2 * rows * 5 * 6
