"""The fused experts on a CPU against plain products in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moeca_fx.graph.gated_form import ACTIVATIONS
from moeca_fx.kernels.cpu import ops as kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
ops = torch.ops.moeca_cpu
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
EXPERTS, WIDTH, HIDDEN, TOKENS, TOP_K = 5, 24, 12, 40, 3


def _weights(
    gated: bool = True,
    bias: bool = False,
    activation: str = "silu",
    width: int = WIDTH,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Operands as kernels take them."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(EXPERTS, *shape) / shape[-1] ** 0.5).to(dtype)

    gate = (draw(hidden, width), draw(hidden) if bias else None) if gated else (None, None)
    up, down = (
        (draw(hidden, width), draw(hidden) if bias else None),
        (draw(width, hidden), draw(width) if bias else None),
    )
    return (*gate, *up, *down, ACTIVATIONS.index(activation))


def _expert(x: Tensor, weights: tuple[Any, ...], index: int) -> Tensor:
    """One expert in fp64."""
    gate, gate_bias, up, up_bias, down, down_bias = (w[index].double() if w is not None else None for w in weights[:6])
    act = FUNCTIONS[ACTIVATIONS[weights[6]]]
    x = x.double()
    hidden = functional.linear(x, up, up_bias)
    hidden = act(hidden) if gate is None else act(functional.linear(x, gate, gate_bias)) * hidden
    return functional.linear(hidden, down, down_bias)


def _routing(tokens: int = TOKENS, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    expert = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(tokens)])
    return expert, torch.rand(tokens, TOP_K)


def _features(x: Tensor, expert: Tensor, weights: tuple[Any, ...]) -> Tensor:
    """Feature of every branch, fp64 [N, k, H]."""
    return torch.stack(
        [torch.stack([_expert(row, weights, int(e)) for e in own]) for row, own in zip(x, expert, strict=True)]
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_form(activation: str, gated: bool, bias: bool) -> None:
    weights = _weights(gated, bias, activation)
    x, (expert, weight) = torch.randn(TOKENS, WIDTH), _routing()
    expected = _features(x, expert, weights)
    feature, norm = ops.branches(x, expert, *weights)
    torch.testing.assert_close(feature.view(TOKENS, TOP_K, -1).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.view(TOKENS, TOP_K).double(), expected.norm(dim=-1), rtol=1e-5, atol=1e-5)
    mixed = (expected * weight.double().unsqueeze(-1)).sum(1)
    torch.testing.assert_close(ops.mixture(x, expert, weight, *weights).double(), mixed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "hidden"), [(115, 7), (1, 1), (8, 200)])
def test_widths_that_fit_no_vector(width: int, hidden: int) -> None:
    weights = _weights(bias=True, width=width, hidden=hidden)
    x, (expert, _) = torch.randn(TOKENS, width), _routing()
    expected = _features(x, expert, weights)
    torch.testing.assert_close(
        ops.branches(x, expert, *weights)[0].view(TOKENS, TOP_K, -1).double(), expected, rtol=1e-5, atol=1e-5
    )


TWO_ROUNDINGS = 4e-3
"""Relative error of a result in bf16 whose hidden values may have been rounded to bf16 too, as torch rounds them."""


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("hidden", [HIDDEN, 64, 7])  # an odd number makes no pairs
def test_bf16_is_added_up_in_fp32(hidden: int) -> None:
    weights = _weights(bias=True, hidden=hidden, dtype=torch.bfloat16)
    x, (expert, weight) = torch.randn(TOKENS, WIDTH).bfloat16(), _routing()
    expected = _features(x, expert, weights)
    feature, _ = ops.branches(x, expert, *weights)
    assert feature.dtype == torch.bfloat16
    assert _relative_error(feature.view_as(expected), expected) < TWO_ROUNDINGS
    mixed = (expected * weight.double().unsqueeze(-1)).sum(1)
    assert _relative_error(ops.mixture(x, expert, weight, *weights), mixed) < TWO_ROUNDINGS


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rows", [4, 5, 6, 7, 17, 130])
def test_every_number_of_rows_in_bf16(rows: int, gated: bool) -> None:
    weights = _weights(gated, bias=True, hidden=22, dtype=torch.bfloat16)
    x, expert = torch.randn(rows, WIDTH).bfloat16(), torch.full((rows, 1), 2)
    found, _ = ops.branches(x, expert, *weights)
    assert _relative_error(found, _expert(x, weights, 2)) < TWO_ROUNDINGS


@pytest.mark.parametrize(("width", "hidden"), [(700, 130), (1300, 1100)])  # of numbers, of pairs
def test_a_bf16_panel_that_does_not_fit_at_once(width: int, hidden: int) -> None:
    weights = _weights(width=width, hidden=hidden, dtype=torch.bfloat16)
    transposed = tuple(w.transpose(1, 2).contiguous().transpose(1, 2) if w is not None else None for w in weights[:6])
    x, (expert, _) = torch.randn(20, width).bfloat16(), _routing(20)
    expected = _features(x, expert, weights)
    for operands in (weights[:6], transposed):
        found = ops.branches(x, expert, *operands, weights[6])[0].view_as(expected)
        assert _relative_error(found, expected) < TWO_ROUNDINGS


def test_weights_of_a_transposed_stack() -> None:
    weights = _weights()
    transposed = tuple(w.transpose(1, 2).contiguous().transpose(1, 2) if w is not None else None for w in weights[:6])
    x, (expert, _) = torch.randn(TOKENS, WIDTH), _routing()
    torch.testing.assert_close(ops.branches(x, expert, *transposed, 0)[0], ops.branches(x, expert, *weights)[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    weights = _weights()
    x, (expert, weight) = torch.randn(400, WIDTH), _routing(400)
    alone = ops.mixture(x, expert, weight, *weights), ops.branches(x, expert, *weights)[0]
    torch.set_num_threads(threads)
    together = ops.mixture(x, expert, weight, *weights), ops.branches(x, expert, *weights)[0]
    for one, many in zip(alone, together, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5, 8])
@pytest.mark.parametrize("tokens", [1, 13, 90, 700])  # few rows an expert: experts are shared out, then tokens, or both
def test_a_mixture_divided_among_threads(tokens: int, threads: int) -> None:
    weights = _weights(bias=True)
    chosen = [torch.randperm(EXPERTS)[:4] for _ in range(tokens)]
    expert, weight, x = torch.stack(chosen), torch.rand(tokens, 4), torch.randn(tokens, WIDTH)
    torch.set_num_threads(threads)
    found = ops.mixture(x, expert, weight, *weights)
    every = torch.stack([_expert(x, weights, index) for index in range(EXPERTS)], 1)
    features = every.gather(1, expert.unsqueeze(-1).expand(-1, -1, WIDTH))
    expected = (features * weight.double().unsqueeze(-1)).sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.mixture(x, expert, weight, *weights), found), "sums in another order"


def test_grouped_rows_with_experts_that_get_none() -> None:
    weights = _weights()
    ends = torch.tensor([0, 3, 3, 10, 10])
    x = torch.randn(10, WIDTH)
    expected = torch.cat([_expert(x[:3], weights, 1), _expert(x[3:], weights, 3)])
    torch.testing.assert_close(ops.grouped(x, ends, *weights).double(), expected, rtol=1e-5, atol=1e-5)
    assert ops.grouped(x[:0], torch.zeros(EXPERTS, dtype=torch.int64), *weights).shape == (0, WIDTH)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_writes_the_picked_branches_only(share: float, dtype: torch.dtype) -> None:
    weights = _weights(dtype=dtype)
    x, (expert, _) = torch.randn(TOKENS, WIDTH).to(dtype), _routing()
    code = (torch.rand(TOKENS, TOP_K) < share).to(torch.int8) * torch.randint(1, 3, (TOKENS, TOP_K)).to(torch.int8)
    before = torch.randn(2, TOKENS // 2, TOP_K, WIDTH).to(dtype)
    feature, norm = before.clone(), torch.full((2, TOKENS // 2, TOP_K), -1.0)
    shaped = (code.view_as(norm), expert.view(norm.shape))
    assert kernels.recompute_branches(feature, norm, x, *shaped, None, *weights)[0] is feature
    fresh = ops.branches(x, expert, *weights)[0].view_as(before)
    picked = (code > 0).view(norm.shape)
    assert torch.equal(feature[~picked], before[~picked])
    if dtype == torch.bfloat16:  # a few rows are computed in fp32
        assert _relative_error(feature, torch.where(picked.unsqueeze(-1), fresh, before).double()) < TWO_ROUNDINGS
    else:
        torch.testing.assert_close(feature, torch.where(picked.unsqueeze(-1), fresh, before))  # fewer rows, other sums
    assert torch.equal(norm > 0, picked)
    if share:
        torch.testing.assert_close(norm[picked], fresh[picked].float().norm(dim=-1), rtol=4e-3, atol=1e-3)


def test_recompute_of_some_token_rows() -> None:
    weights = _weights()
    row = torch.tensor([1, 7, 30])
    x, (expert, _) = torch.randn(3, WIDTH), _routing(3)
    code = torch.tensor([[0, 1, 0], [2, 0, 1], [0, 0, 0]], dtype=torch.int8)
    feature = torch.zeros(1, TOKENS, TOP_K, WIDTH)
    ops.recompute(feature, None, x, code, expert, row, *weights)
    expected = torch.zeros(TOKENS, TOP_K, WIDTH)
    expected[row] = _features(x, expert, weights).float() * (code > 0).unsqueeze(-1)
    torch.testing.assert_close(feature[0], expected, rtol=1e-5, atol=1e-5)


def test_a_cache_in_bf16_beside_a_model_in_fp32() -> None:
    weights = _weights()
    x, (expert, _) = torch.randn(TOKENS, WIDTH), _routing()
    feature = torch.zeros(1, TOKENS, TOP_K, WIDTH, dtype=torch.bfloat16)
    ops.recompute(feature, None, x, torch.ones(TOKENS, TOP_K, dtype=torch.int8), expert, None, *weights)
    assert torch.equal(feature.flatten(0, 2), ops.branches(x, expert, *weights)[0].bfloat16())


def test_operators_follow_torchs_rules() -> None:
    weights = _weights()
    x, (expert, weight) = torch.randn(TOKENS, WIDTH), _routing()
    code = torch.ones(TOKENS, TOP_K, dtype=torch.int8)
    cases = [
        (ops.branches.default, (x, expert, *weights)),
        (ops.mixture.default, (x, expert, weight, *weights)),
        (ops.grouped.default, (x, torch.tensor([8, 16, 24, 32, TOKENS]), *weights)),
        (ops.recompute.default, (torch.zeros(TOKENS, TOP_K, WIDTH), None, x, code, expert, None, *weights)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refusals_name_what_was_found() -> None:
    weights = _weights(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected float32 or bfloat16, found"):
        ops.branches(torch.randn(TOKENS, WIDTH), _routing()[0], *weights)
    strided = torch.randn(EXPERTS, HIDDEN, 2 * WIDTH, 2)[:, :, ::2, 0]
    with pytest.raises(RuntimeError, match="one unit stride"):
        ops.branches(torch.randn(TOKENS, WIDTH), _routing()[0], strided, None, *_weights()[2:])
    for wrong in (-1, EXPERTS):
        with pytest.raises(IndexError, match=f"expected expert ids from 0 to {EXPERTS - 1}, found {wrong}"):
            ops.mixture(torch.randn(1, WIDTH), torch.full((1, TOP_K), wrong), torch.ones(1, TOP_K), *_weights())
