"""The device-side plan against `ops.dispatch.plan_recomputed`."""

import pytest
import torch

from moeca_fx.ops import dispatch

pytest.importorskip("triton", reason="triton is not installed")
from moeca_fx.kernels.triton_gpu import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("rows", "top_k", "experts"), [(333, 5, 48), (900, 1, 16), (40, 2, 8), (7, 3, 1)])
def test_equals_the_reference(rows: int, top_k: int, experts: int, share: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    code = (torch.rand(rows, top_k, generator=generator) < share).to(torch.int8)
    code = code * torch.randint(1, 3, code.shape, generator=generator, dtype=torch.int8)
    expert = torch.randint(0, max(1, experts - 2), code.shape, generator=generator)  # the last two have no rows
    order, offsets, count = plan(code.to(DEVICE), expert.to(DEVICE), experts)
    expected, _, _, ends = dispatch.plan_recomputed(code, expert, None, experts)
    assert order.dtype == torch.int64 and offsets.dtype == torch.int32
    assert int(count) == len(expected) and offsets.tolist() == ends.tolist()
    assert order[: len(expected)].tolist() == expected.tolist()
    assert sorted(order.tolist()) == list(range(rows * top_k))


def test_what_is_not_computed_may_have_no_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    expert = torch.randint(0, 5, (60, 3), generator=generator)  # 4 is no expert
    code = (expert < 4).to(torch.int8)
    order, offsets, count = plan(code.to(DEVICE), expert.to(DEVICE), 4)
    expected, _, _, ends = dispatch.plan_recomputed(code, expert, None, 4)
    assert 0 < int(count) == len(expected) < expert.numel() and offsets.tolist() == ends.tolist()
    assert order[: len(expected)].tolist() == expected.tolist()


def test_no_rows() -> None:
    empty = torch.zeros(0, 5, device=DEVICE)
    order, offsets, count = plan(empty.to(torch.int8), empty.to(torch.int64), 4)
    assert order.shape == (0,) and offsets.tolist() == [0, 0, 0, 0] and int(count) == 0
