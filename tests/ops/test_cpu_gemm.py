"""The linear that the own kernel and two libraries share, and the measurement that chooses between them."""

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.ops import cpu_gemm
from moeca_fx.ops.cpu_gemm import Fastest
from moeca_fx.timing import pinned_threads

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
@pytest.mark.parametrize("rows", [5, 16, 64, 65, 129, 256, 257, 600])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(256, 127), (16, 512), (130, 64), (48, 384), (33, 1), (4, 40), (1, 70)]
)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_rows(rows: int, outputs: int, inputs: int, threads: int) -> None:
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    with pinned_threads(threads):
        found = linear(x, weight, bias, 1000, None)
    torch.testing.assert_close(found, functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 4, 6, 7, 33, 64, 65, 100])
@pytest.mark.parametrize(("count", "outputs"), [(1, 5), (3, 200), (7, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_siblings(rows: int, count: int, outputs: int, dtype: torch.dtype, strided: bool, threads: int) -> None:
    x = torch.randn(rows, 24, dtype=dtype)
    layers = [(torch.randn(outputs, 24, dtype=dtype), torch.randn(outputs, 2, dtype=dtype)[:, 0]) for _ in range(count)]
    if strided:
        layers[0] = (layers[0][0].T.contiguous().T, layers[0][1])
    layers[-1] = (layers[-1][0], None)
    with pinned_threads(threads):
        found = torch.ops.moeca_cpu.sibling_linears(x, sys.maxsize, None, *(part for layer in layers for part in layer))
    expected = [functional.linear(x.float(), w.float(), b if b is None else b.float()) for w, b in layers]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.stack(expected).to(dtype), **close)


@needs_kernels
def test_siblings_beyond_the_own_kernel_and_their_flops() -> None:
    x, weights = torch.randn(70, 6), [torch.randn(5, 6), torch.randn(5, 6)]
    arguments = (x, 8, ONEDNN, weights[0], None, weights[1], torch.randn(5))
    with FlopCounterMode(display=False) as counter:
        found = torch.ops.moeca_cpu.sibling_linears(*arguments)
    torch.testing.assert_close(found, torch.stack([x @ weights[0].T, x @ weights[1].T + arguments[-1]]))
    assert counter.get_total_flops() == 2 * 70 * 6 * 10
    torch.library.opcheck(torch.ops.moeca_cpu.sibling_linears.default, arguments)


@needs_kernels
def test_what_siblings_are_not_is_refused() -> None:
    op, weight = torch.ops.moeca_cpu.sibling_linears, torch.randn(5, 6)
    with pytest.raises(RuntimeError, match=r"expected a weight \[N, K\]"):
        op(torch.randn(3, 7), 8, None, weight, None)
    with pytest.raises(RuntimeError, match="expected rows"):
        op(torch.randn(2, 3, 6), 8, None, weight, None)
    with pytest.raises(RuntimeError, match="expected rows"):
        op(torch.randn(3, 6), 8, None)
    with pytest.raises(RuntimeError, match="one size, found 5 and 4"):
        op(torch.randn(3, 6), 8, None, weight, None, weight[:4], None)
    with pytest.raises(RuntimeError, match="a bias without a weight"):
        op(torch.randn(3, 6), 8, None, weight, None, None, torch.randn(5))


@needs_kernels
@pytest.mark.parametrize("own_up_to", [0, 100])
def test_tokens_of_a_batch_count_as_rows(own_up_to: int) -> None:
    x, weight = torch.randn(2, 20, 6), torch.randn(5, 6)
    torch.testing.assert_close(linear(x, weight, None, own_up_to, ONEDNN), functional.linear(x, weight))
    strided = torch.randn(20, 2, 6).transpose(0, 1)
    torch.testing.assert_close(linear(strided, weight, None, own_up_to, ONEDNN), functional.linear(strided, weight))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(1, 1, 1), (3, 130, 17), (5, 700, 40), (6, 131, 40), (7, 131, 40), (300, 50, 33), (90, 2, 33), (300, 16, 40)],
)
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
def fresh_measurement(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_gemm.kernels, "available", lambda: True)
    monkeypatch.setattr(cpu_gemm, "has_onednn", lambda: True)
    cpu_gemm._fastest.cache_clear()
    yield
    cpu_gemm._fastest.cache_clear()


TINY, SMALL, LARGE = 128 * 128, 384 * 128, 384 * 384


@pytest.mark.usefixtures("fresh_measurement")
@pytest.mark.parametrize(
    ("own_at", "onednn_at", "expected"),
    [
        ([], [], Fastest()),
        ([4], [1024], Fastest(4, 1024)),
        ([4, 16], [256, 1024], Fastest(16, 256)),
        ([4, 16, 64], [16, 64, 256, 1024], Fastest(64, 16)),
        ([4, 16, 64, 256, 1024], [1024], Fastest(sys.maxsize, 1024)),
        ([16, 64], [64], Fastest()),
    ],
)
def test_each_is_used_where_it_is_faster_without_a_gap(
    own_at: list[int], onednn_at: list[int], expected: Fastest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(name: str, count: int, weight: Tensor, other: str = "") -> float:
        return 0.5 if count in (onednn_at if name == "oneDNN" else own_at) else 1.05

    monkeypatch.setattr(cpu_gemm, "_share", share)
    for values in (TINY, SMALL, LARGE):
        assert cpu_gemm.fastest_linear(values, rows_vary=False) == expected
    monkeypatch.setattr(cpu_gemm, "_share", lambda *rest: pytest.fail("measured again"))
    assert cpu_gemm.fastest_linear(LARGE + 1, rows_vary=False) == expected


@pytest.mark.usefixtures("fresh_measurement")
def test_the_own_kernel_must_be_no_slower_than_the_faster_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(name: str, count: int, weight: Tensor, other: str = "") -> float:
        return 1.1 if other == "oneDNN" and count > 64 else 0.9

    monkeypatch.setattr(cpu_gemm, "_share", share)
    assert cpu_gemm.fastest_linear(LARGE, rows_vary=False) == Fastest(64, 4)
    assert cpu_gemm.fastest_linear(LARGE, rows_vary=True) == Fastest(sys.maxsize, None)  # beside the default alone


@pytest.mark.usefixtures("fresh_measurement")
def test_a_onednn_that_is_not_used_does_not_hinder_the_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(name: str, count: int, weight: Tensor, other: str = "") -> float:
        return 1.04 if other == "oneDNN" else 0.97

    monkeypatch.setattr(cpu_gemm, "_share", share)
    assert cpu_gemm.fastest_linear(SMALL, rows_vary=False) == Fastest(sys.maxsize, None)


@pytest.mark.usefixtures("fresh_measurement")
def test_small_weights_have_limits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpu_gemm, "_share", lambda name, count, weight, *rest: 0.9 if count * weight.numel() < 8e5 else 2
    )
    assert cpu_gemm.fastest_linear(TINY, rows_vary=True) == Fastest(256)
    assert cpu_gemm.fastest_linear(SMALL, rows_vary=True) == Fastest(16)
    assert cpu_gemm.fastest_linear(LARGE, rows_vary=True) == Fastest(0)


@pytest.mark.usefixtures("fresh_measurement")
def test_what_is_not_there_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "has_onednn", lambda: False)
    monkeypatch.setattr(cpu_gemm, "_share", lambda *names: pytest.fail(str(names)) if "oneDNN" in names else 0.5)
    assert cpu_gemm.fastest_linear(LARGE, rows_vary=False) == Fastest(sys.maxsize, None)
    cpu_gemm._fastest.cache_clear()
    monkeypatch.setattr(cpu_gemm.kernels, "available", lambda: False)
    monkeypatch.setattr(cpu_gemm, "_share", lambda *names: pytest.fail(str(names)))
    assert cpu_gemm.fastest_linear(LARGE, rows_vary=False) == Fastest()


@needs_kernels
@pytest.mark.parametrize("name", ["the own kernel", "oneDNN"])
def test_the_measurement_times_what_it_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "oneDNN" and not cpu_gemm.has_onednn():
        pytest.skip("this torch has no oneDNN linear")
    outputs = []
    monkeypatch.setattr(cpu_gemm, "share_of_time", lambda run, default: outputs.extend((run(), default())) or 0.25)
    assert cpu_gemm._share(name, 20, torch.randn(48, 32)) == 0.25
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("fastest", "rows", "never"),
    [(Fastest(), 1, True), (Fastest(16), 16, False), (Fastest(16), 17, True), (Fastest(0, 128), 17, False)],
)
def test_where_the_default_always_serves(fastest: Fastest, rows: int, never: bool) -> None:
    assert fastest.never(rows) == never
