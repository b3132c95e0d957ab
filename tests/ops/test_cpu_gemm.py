"""The linear that the own kernel and two libraries share, and the measurement that chooses between them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops import cpu_gemm
from moeca_fx.ops.cpu_gemm import Fastest

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
ONEDNN = 32 if cpu_gemm.has_onednn() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, own_up_to: int, onednn_from: int | None) -> Tensor:
    found: Tensor = torch.ops.moeca_cpu.chosen_linear(x, weight, bias, own_up_to, onednn_from)
    return found


@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 4, 8, 9, 31, 32, 100])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_equals_torch_on_all_sides_of_the_limits(rows: int, bias: bool) -> None:
    x, weight = torch.randn(rows, 6), torch.randn(5, 6)
    added = torch.randn(5) if bias else None
    torch.testing.assert_close(linear(x, weight, added, 8, ONEDNN), functional.linear(x, weight, added))


@needs_kernels
@pytest.mark.parametrize("rows", [64, 65, 256, 257])
@pytest.mark.parametrize("inputs", [127, 512])  # of a small weight and a large one
def test_more_rows_of_a_large_weight(rows: int, inputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(256, inputs)
    torch.testing.assert_close(linear(x, weight, None, 256, None), functional.linear(x, weight), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("own_up_to", [0, 100])
def test_tokens_of_a_batch_count_as_rows(own_up_to: int) -> None:
    x, weight = torch.randn(2, 20, 6), torch.randn(5, 6)
    torch.testing.assert_close(linear(x, weight, None, own_up_to, ONEDNN), functional.linear(x, weight))
    strided = torch.randn(20, 2, 6).transpose(0, 1)
    torch.testing.assert_close(linear(strided, weight, None, own_up_to, ONEDNN), functional.linear(strided, weight))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (3, 130, 17), (5, 700, 40), (300, 50, 33)])
def test_the_own_kernel(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    expected = functional.linear(x.double(), weight.double(), bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for operand in (weight, weight.t().contiguous().t()):
        found = torch.ops.moeca_cpu.linear(x, operand, bias)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@needs_kernels
def test_refusals_name_what_was_found() -> None:
    with pytest.raises(RuntimeError, match="float32 or both in bfloat16, found Double and Double"):
        torch.ops.moeca_cpu.linear(torch.randn(3, 4).double(), torch.randn(5, 4).double(), None)
    with pytest.raises(RuntimeError, match="found Float and BFloat16"):
        torch.ops.moeca_cpu.linear(torch.randn(3, 4), torch.randn(5, 4).bfloat16(), None)


@needs_kernels
@pytest.mark.parametrize("shape", [(40, 6), (2, 20, 6), (3, 6), (0, 6)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    arguments = (torch.randn(shape), torch.randn(5, 6), torch.randn(5), 8, ONEDNN)
    op = torch.ops.moeca_cpu.chosen_linear.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_kernels
@pytest.mark.parametrize("rows", [3, 20, 40])
def test_flops_are_counted_once(rows: int) -> None:
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(rows, 6), torch.randn(5, 6), torch.randn(5), 8, ONEDNN)
    assert counter.get_total_flops() == 2 * rows * 5 * 6


@pytest.fixture
def fresh_measurement() -> Iterator[None]:
    cpu_gemm.fastest_linear.cache_clear()
    yield
    cpu_gemm.fastest_linear.cache_clear()


@pytest.mark.usefixtures("fresh_measurement")
@pytest.mark.parametrize(
    ("own_at", "onednn_at", "expected"),
    [
        ([], [], Fastest()),
        ([4], [512], Fastest(4, 512)),
        ([4, 16], [128, 512], Fastest(16, 128)),
        ([4, 16, 64], [32, 128, 512], Fastest(64, 32)),
        ([4, 16, 64, 256, 512, 1024], [512], Fastest(1024, 512)),
        ([16, 64], [32], Fastest()),
    ],
)
def test_each_is_used_where_it_is_faster_without_a_gap(
    own_at: list[int], onednn_at: list[int], expected: Fastest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(name: str, count: int, *rest: object) -> float:
        return 0.5 if count in (onednn_at if name == "oneDNN" else own_at) else 0.97  # the latter may be noise

    monkeypatch.setattr(cpu_gemm.kernels, "available", lambda: True)
    monkeypatch.setattr(cpu_gemm, "has_onednn", lambda: True)
    monkeypatch.setattr(cpu_gemm, "_share", share)
    assert cpu_gemm.fastest_linear() == expected
    assert cpu_gemm.fastest_linear() == expected  # measured once


@pytest.mark.usefixtures("fresh_measurement")
def test_what_is_not_there_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "has_onednn", lambda: False)
    monkeypatch.setattr(cpu_gemm.kernels, "available", lambda: True)
    monkeypatch.setattr(cpu_gemm, "_share", lambda name, *rest: pytest.fail(name) if name == "oneDNN" else 0.5)
    assert cpu_gemm.fastest_linear() == Fastest(1024, None)
    cpu_gemm.fastest_linear.cache_clear()
    monkeypatch.setattr(cpu_gemm.kernels, "available", lambda: False)
    monkeypatch.setattr(cpu_gemm, "_share", lambda name, *rest: pytest.fail(name))
    assert cpu_gemm.fastest_linear() == Fastest()


@pytest.mark.parametrize(
    ("fastest", "rows", "never"),
    [(Fastest(), 1, True), (Fastest(16), 16, False), (Fastest(16), 17, True), (Fastest(0, 128), 17, False)],
)
def test_where_the_default_always_serves(fastest: Fastest, rows: int, never: bool) -> None:
    assert fastest.never(rows) == never
