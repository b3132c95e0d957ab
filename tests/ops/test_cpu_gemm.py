"""The linear that two libraries share, and the measurement that chooses between them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moeca_fx.ops import cpu_gemm

needs_onednn = pytest.mark.skipif(
    not cpu_gemm.has_onednn(), reason="this torch has no oneDNN linear, or there is no C++ compiler"
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, from_rows: int) -> Tensor:
    found: Tensor = torch.ops.moeca_cpu.onednn_linear(x, weight, bias, from_rows)
    return found


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 100])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_equals_torch_on_both_sides_of_the_limit(rows: int, bias: bool) -> None:
    x, weight = torch.randn(rows, 6), torch.randn(5, 6)
    added = torch.randn(5) if bias else None
    torch.testing.assert_close(linear(x, weight, added, 32), functional.linear(x, weight, added))


@needs_onednn
def test_tokens_of_a_batch_count_as_rows() -> None:
    x, weight = torch.randn(2, 20, 6), torch.randn(5, 6)
    torch.testing.assert_close(linear(x, weight, None, 32), functional.linear(x, weight))
    strided = torch.randn(20, 2, 6).transpose(0, 1)
    torch.testing.assert_close(linear(strided, weight, None, 32), functional.linear(strided, weight))


@needs_onednn
@pytest.mark.parametrize("shape", [(40, 6), (2, 20, 6), (3, 6), (0, 6)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    arguments = (torch.randn(shape), torch.randn(5, 6), torch.randn(5), 32)
    torch.library.opcheck(
        torch.ops.moeca_cpu.onednn_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@needs_onednn
@pytest.mark.parametrize("rows", [3, 40])
def test_flops_are_counted_once(rows: int) -> None:
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(rows, 6), torch.randn(5, 6), torch.randn(5), 32)
    assert counter.get_total_flops() == 2 * rows * 5 * 6


@pytest.fixture
def fresh_measurement() -> Iterator[None]:
    cpu_gemm.onednn_from_rows.cache_clear()
    yield
    cpu_gemm.onednn_from_rows.cache_clear()


@needs_onednn
@pytest.mark.usefixtures("fresh_measurement")
@pytest.mark.parametrize(
    ("faster_at", "expected"), [([], None), ([512], 512), ([128, 512], 128), ([32, 128, 512], 32), ([32], None)]
)
def test_onednn_is_used_from_where_it_is_faster_up(
    faster_at: list[int], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([512, 128, 32])

    def shares(*runs: object) -> float:
        return 0.5 if next(counts) in faster_at else 0.97  # the latter may be noise

    monkeypatch.setattr(cpu_gemm, "share_of_time", shares)
    assert cpu_gemm.onednn_from_rows() == expected
    assert cpu_gemm.onednn_from_rows() == expected  # measured once


@pytest.mark.usefixtures("fresh_measurement")
def test_without_onednn_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "has_onednn", lambda: False)
    monkeypatch.setattr(cpu_gemm, "share_of_time", lambda *runs: pytest.fail("must not be timed"))
    assert cpu_gemm.onednn_from_rows() is None
