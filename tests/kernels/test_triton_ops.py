"""`torch.ops.moeca_gpu` in the interpreter against the reference functions, with the layouts that graphs hand over."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moeca_fx.graph.gated_form import ACTIVATIONS
from moeca_fx.ops import attention_rows, dispatch
from moeca_fx.policies import branch

pytest.importorskip("triton", reason="triton is not installed")
from moeca_fx.kernels.triton_gpu import ops as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, WIDTH, HIDDEN, TOKENS, TOP_K, MARK = 5, 24, 9, 14, 3, -7.0
FUNCTIONS = (functional.silu, functional.gelu, lambda x: functional.gelu(x, approximate="tanh"), functional.relu)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.moeca_gpu


def _near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _weights(
    dtype: torch.dtype = torch.float32, gated: bool = True, bias: bool = False, act: str = "silu"
) -> tuple[Any, ...]:
    """Operands as kernels take them; gate and up, and their biases, are views of one packed parameter."""
    packed, packed_bias = _draw(EXPERTS, 2 * HIDDEN, WIDTH) * WIDTH**-0.5, _draw(EXPERTS, 2 * HIDDEN)
    down, down_bias = _draw(EXPERTS, WIDTH, HIDDEN) * HIDDEN**-0.5, _draw(EXPERTS, WIDTH)
    (gate, up), (gate_bias, up_bias) = packed.to(dtype).split(HIDDEN, 1), packed_bias.to(dtype).split(HIDDEN, 1)
    biases = (gate_bias, up_bias, down_bias.to(dtype)) if bias else (None, None, None)
    first = (gate, biases[0]) if gated else (None, None)
    return (*first, up, biases[1], down.to(dtype), biases[2], ACTIVATIONS.index(act))


def _feature(row: Tensor, weights: tuple[Any, ...], index: Tensor) -> Tensor:
    """One branch in fp64."""
    gate, gate_bias, up, up_bias, down, down_bias = (w[index].double() if w is not None else None for w in weights[:6])
    act, row = FUNCTIONS[weights[6]], row.double()
    hidden = functional.linear(row, up, up_bias)
    hidden = act(hidden) if gate is None else act(functional.linear(row, gate, gate_bias)) * hidden
    return functional.linear(hidden, down, down_bias)


def _features(x: Tensor, expert: Tensor, weights: tuple[Any, ...]) -> Tensor:
    """Every branch, fp64 [N*k, H]."""
    pairs = zip(x, expert, strict=True)
    return torch.stack([_feature(row, weights, index) for row, own in pairs for index in own])


def _routing(tokens: int = TOKENS) -> Tensor:
    return torch.rand(tokens, EXPERTS, device=DEVICE).argsort(-1)[:, :TOP_K]


def test_the_signatures_are_those_of_the_cpu_kernels() -> None:
    from moeca_fx.kernels.cpu import ops as cpu

    if not cpu.available():
        pytest.skip("there is no C++ compiler to build the CPU kernels")
    for name in ("branches", "grouped", "recompute", "decide", "attention_rows"):
        one, other = (getattr(getattr(torch.ops, space), name).default._schema for space in ("moeca_gpu", "moeca_cpu"))
        for left, right in ((one.arguments, other.arguments), (one.returns, other.returns)):
            assert [(a.name, str(a.type), a.is_write) for a in left] == [
                (a.name, str(a.type), a.is_write) for a in right
            ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_branches(dtype: torch.dtype) -> None:
    weights, expert = _weights(dtype), _routing()
    x = _draw(2, TOKENS // 2, WIDTH, dtype=dtype)
    feature, norm = ops.branches(x, expert, *weights)
    _near(feature, _features(x.flatten(0, 1), expert, weights), dtype)
    torch.testing.assert_close(norm, dispatch.feature_norm(feature), rtol=1e-5, atol=0)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_biases_that_are_views(act: str, gated: bool) -> None:
    weights, expert, x = _weights(gated=gated, bias=True, act=act), _routing(5), _draw(5, WIDTH)
    assert not weights[3].is_contiguous()
    _near(ops.branches(x, expert, *weights)[0], _features(x, expert, weights), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_grouped_already(dtype: torch.dtype) -> None:
    weights, x = _weights(dtype, bias=True), _draw(7, WIDTH, dtype=dtype)
    expert, ends = torch.tensor([0, 0, 1, 3, 3, 3, 4], device=DEVICE), torch.tensor([2, 3, 3, 6, 7], device=DEVICE)
    _near(ops.grouped(x, ends, *weights), _features(x, expert.unsqueeze(1), weights), dtype)
    assert ops.grouped(x[:0], torch.zeros_like(ends), *weights).shape == (0, WIDTH)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputed_branches_are_written_and_no_other(dtype: torch.dtype, selected: bool, share: float) -> None:
    weights = _weights(dtype)
    row = torch.tensor([1, 4, 5, 11], device=DEVICE) if selected else None
    count = len(row) if row is not None else TOKENS
    x, expert = _draw(count, WIDTH, dtype=dtype), _routing(count)
    code = (torch.rand(count, 1, TOP_K, device=DEVICE) < share).to(torch.int8) * 2
    feature = torch.full((2, TOKENS // 2, TOP_K, WIDTH), MARK, dtype=dtype, device=DEVICE)
    norm = torch.full((2, TOKENS // 2, TOP_K), MARK, device=DEVICE)
    expected = feature.flatten(0, 2).double()
    branches, _, _, _ = dispatch.plan_recomputed(code, expert, row, EXPERTS)
    if len(branches):
        every = torch.arange(TOKENS, device=DEVICE) if row is None else row
        at = (every[:, None] * TOP_K + torch.arange(TOP_K, device=DEVICE)).flatten()[code.flatten() > 0]
        expected[at] = _features(x, expert, weights)[code.flatten() > 0]
    ops.recompute(feature, norm, x.unsqueeze(1), code, expert.unsqueeze(1), row, *weights)
    _near(feature.flatten(0, 2), expected, dtype)
    live = expected[:, 0] != MARK
    assert int(live.sum()) == len(branches) and (norm.flatten()[~live] == MARK).all()
    torch.testing.assert_close(norm.flatten()[live], dispatch.feature_norm(feature).flatten()[live], rtol=1e-5, atol=0)


def test_no_rows_and_no_norms() -> None:
    weights, feature = _weights(), torch.full((1, TOKENS, TOP_K, WIDTH), MARK, device=DEVICE)
    none = torch.zeros(0, TOP_K, dtype=torch.int64, device=DEVICE)
    ops.recompute(feature, None, _draw(0, WIDTH), none.to(torch.int8), none, none[:, 0], *weights)
    assert (feature == MARK).all()
    x, expert = _draw(TOKENS, WIDTH), _routing()
    ops.recompute(feature, None, x, torch.ones_like(expert, dtype=torch.int8), expert, None, *weights)
    _near(feature.flatten(0, 2), _features(x, expert, weights), torch.float32)
    assert [tuple(part.shape) for part in ops.branches(x[:0], expert[:0], *weights)] == [(0, WIDTH), (0,)]


def _decision(top_k: int = TOP_K) -> list[Tensor]:
    now, then = (torch.rand(2, 7, EXPERTS, device=DEVICE).argsort(-1)[..., :top_k] for _ in range(2))
    weights = [torch.rand(2, 7, top_k, device=DEVICE) for _ in range(3)]
    return [now, weights[0], then, weights[1], weights[2], torch.rand(2, EXPERTS, device=DEVICE) + 0.4]


def _compare_decisions(operands: list[Tensor]) -> None:
    found = ops.decide(*operands, None, 1.1, 0.6, True, None)
    expected = branch.decide(*operands, 1.1, 0.6, "share")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_a_decision_by_score_of_permuted_routings() -> None:
    operands = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in _decision()[:5]]
    _compare_decisions([*operands, _decision()[5]])


def test_slots_that_hold_no_expert_yet() -> None:
    operands = _decision()
    operands[2][0] = -1
    _compare_decisions(operands)


def test_other_decisions_are_refused() -> None:
    *operands, threshold = _decision()
    pick = torch.zeros_like(operands[0], dtype=torch.bool)
    for norm, limit, picked, margin in (
        (None, threshold, None, None),
        (operands[4], None, None, None),
        (operands[4], threshold, pick, None),
        (operands[4], threshold, None, 0.1),
    ):
        with pytest.raises(ValueError, match="no pick and no margin"):
            ops.decide(*operands[:4], norm, limit, picked, 1.1, 0.6, True, margin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_a_few_rows(dtype: torch.dtype) -> None:
    query, key = _draw(4, 4, 9, dtype=dtype), _draw(2, 7, 2, 9, dtype=dtype)
    value, row = _draw(2, 7, 2, 5, dtype=dtype), torch.tensor([0, 3, 8, 13], device=DEVICE)
    found = ops.attention_rows(query, key, value, row, 0.3)
    _near(found, attention_rows(query.double(), key.double(), value.double(), row, 0.3), dtype)


def test_shapes_and_flops_without_data() -> None:
    weights, expert, x = _weights(), _routing(), _draw(TOKENS, WIDTH)
    query, key, row = _draw(4, 4, 9), _draw(2, 7, 2, 9), torch.arange(4, device=DEVICE)
    calls = {
        (ops.branches, (x, expert, *weights)): TOKENS * TOP_K * 6 * WIDTH * HIDDEN,
        (ops.grouped, (x, torch.full((EXPERTS,), TOKENS, device=DEVICE), *weights)): TOKENS * 6 * WIDTH * HIDDEN,
        (ops.decide, (*_decision(), None, 1.1, 0.6, True, None)): 0,
        (ops.attention_rows, (query, key, key, row, None)): 2 * 4 * 4 * 7 * 18,
    }
    for (op, arguments), flops in calls.items():
        real = op(*arguments)
        with FakeTensorMode() as fake, FlopCounterMode(display=False) as counter:
            shaped = op(*(fake.from_tensor(part) if isinstance(part, Tensor) else part for part in arguments))
        pairs = [(real, shaped)] if isinstance(real, Tensor) else zip(real, shaped, strict=True)
        assert all((a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) for a, b in pairs)
        assert counter.get_total_flops() == flops


def test_what_torch_demands_of_an_operation() -> None:
    weights, expert, x = _weights(), _routing(4), _draw(4, WIDTH)
    cache, code = torch.zeros(1, 4, TOP_K, WIDTH, device=DEVICE), torch.ones_like(expert, dtype=torch.int8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.branches, (x, expert, *weights), test_utils=checks)
    torch.library.opcheck(kernels.grouped, (x, torch.arange(EXPERTS, device=DEVICE), *weights), test_utils=checks)
    torch.library.opcheck(
        kernels.recompute, (cache, cache[..., 0].contiguous(), x, code, expert, None, *weights), test_utils=checks
    )
    torch.library.opcheck(kernels.decide, (*_decision(), None, 1.1, 0.6, True, None), test_utils=checks)
