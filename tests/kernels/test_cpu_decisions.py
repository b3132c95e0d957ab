"""Fused decisions, thresholds, top-k and adaLN on a CPU against the reference functions."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moeca_fx.kernels.cpu import ops as kernels
from moeca_fx.policies import branch

pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler to build the CPU kernels")
ops = torch.ops.moeca_cpu


def _routing(batch: int, tokens: int, top_k: int, experts: int) -> Tensor:
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(batch * tokens)]).view(batch, tokens, top_k)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("kind", ["share", "raw"])
def test_decide(top_k: int, kind: branch.ScoreWeight) -> None:
    experts, shape = 7, (3, 50, top_k)
    now, then = _routing(3, 50, top_k, experts), _routing(3, 50, top_k, experts)
    weight, held, norm = torch.rand(shape), torch.rand(shape), torch.rand(shape)
    weight[0, :5], norm[1, :5] = 0.0, 0.0  # a token without weight, and one without norms
    threshold = torch.rand(3, experts)
    expected = branch.decide(now, weight, then, held, norm, threshold, 0.7, 0.4, kind)
    found = ops.decide(now, weight, then, held, norm, threshold, None, 0.7, 0.4, kind == "share", None)
    codes = set(found[3].unique().tolist())
    assert 2 in codes and len(codes) > 1
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == want.dtype
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-7)


def test_decide_of_single_token_samples() -> None:
    now, then = _routing(20, 1, 3, 6), _routing(20, 1, 3, 6)
    weight, held, norm, threshold = (torch.rand(20, 1, 3) for _ in range(3)), None, None, torch.rand(20, 6)
    weight, held, norm = weight
    expected = branch.decide(now, weight, then, held, norm, threshold, 1.0, 0.5, "share")
    found = ops.decide(now, weight, then, held, norm, threshold, None, 1.0, 0.5, True, None)
    assert all(torch.equal(have, want) for have, want in zip(found[:2], expected[:2], strict=True))
    assert torch.equal(found[3], expected[3])


def test_a_cache_that_holds_one_expert_twice_breaks_nothing() -> None:
    now, same = _routing(1, 30, 4, 6), torch.zeros(1, 30, 4, dtype=torch.int64)
    slot, slot_expert, _, code = ops.decide(
        now,
        torch.rand(1, 30, 4),
        same,
        *torch.rand(2, 1, 30, 4),
        None,
        torch.zeros(1, 30, 4, dtype=torch.bool),
        0.0,
        0.0,
        True,
        None,
    )
    assert int(slot.min()) >= 0 and int(slot.max()) < 4
    assert int(slot_expert.min()) >= 0 and int(slot_expert.max()) < 6 and int(code.max()) <= 2


@pytest.mark.parametrize("margin", [None, 0.0, 0.2])
def test_decide_picked(margin: float | None) -> None:
    now, then = _routing(2, 40, 4, 9), _routing(2, 40, 4, 9)
    weight, held, picked = torch.rand(2, 40, 4), torch.rand(2, 40, 4), torch.rand(2, 40, 4) < 0.3
    expected = branch.decide_picked(now, weight, then, held, picked, "share", margin)
    found = ops.decide(now, weight, then, held, None, None, picked, 0.0, 0.0, True, margin)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["minmax", "log"])
@pytest.mark.parametrize("tokens", [1, 13, 64])
def test_threshold_and_activation(norm: branch.EntropyNorm, tokens: int) -> None:
    before, expert = torch.rand(3, 6, tokens), _routing(3, tokens, 2, 6)
    before[0, 2] = 0.0  # never selected
    expert[0][expert[0] == 2] = 3
    after = branch.update_activation(before, expert, 0.65)
    expected = branch.expert_threshold(after, 0.8, 0.6, norm)
    found = ops.threshold(before, expert, 0.65, 0.8, 0.6, norm == "log", branch.ALIKE_ENTROPIES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # rounding, stretched to [0, 1]
    assert kernels.update_activation_(before, expert, 0.65) is before
    torch.testing.assert_close(before, after)


def test_experts_that_are_alike_share_one_threshold() -> None:
    before, expert = torch.ones(1, 4, 8), torch.arange(4).expand(1, 8, 4).contiguous()
    found = ops.threshold(before, expert, 0.5, 0.8, 0.6, False, branch.ALIKE_ENTROPIES)
    torch.testing.assert_close(found, torch.full((1, 4), 0.8))


@pytest.mark.parametrize(("columns", "k"), [(16, 4), (48, 5), (3, 3), (700, 8)])
def test_top_k(columns: int, k: int) -> None:
    values = torch.randn(300, columns)
    best, index = ops.top_k(values, k)
    expected = values.topk(k)
    assert torch.equal(best, expected.values) and torch.equal(index, expected.indices)


def test_top_k_of_ties_infinities_and_nan() -> None:
    values = torch.tensor(
        [
            [1.0, 3.0, 3.0, 2.0],
            [-math.inf, 0.0, -math.inf, -math.inf],
            [math.inf, 1.0, math.nan, 2.0],
            [-0.0, 0.0, -1.0, -2.0],
        ]
    )
    best, index = ops.top_k(values, 3)
    assert torch.equal(best[0], torch.tensor([3.0, 3.0, 2.0])) and sorted(index[0].tolist()) == [1, 2, 3]
    assert best[1].tolist() == [0.0, -math.inf, -math.inf] and len(set(index[1].tolist())) == 3
    assert index[2].tolist() == [2, 0, 3] and best[2, 0].isnan()
    assert sorted(index[3].tolist()) == [0, 1, 2]
    assert all(len(set(row)) == 3 for row in index.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 115, 3])
def test_norms(dtype: torch.dtype, width: int) -> None:
    x, y = torch.randn(3, 50, width).to(dtype), torch.randn(3, 50, width).to(dtype)
    modulation = torch.randn(3, 3 * width).to(dtype)
    gate, factor, shift = (part.unsqueeze(1) for part in modulation.chunk(3, dim=1))
    stream = x.double() + gate.double() * y.double()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2

    def normed(value: Tensor) -> Tensor:
        return functional.layer_norm(value, (width,), eps=1e-6) * factor.double() + shift.double()

    found_stream, found = ops.gated_norm(x, gate, y, factor, shift, 1e-6)
    torch.testing.assert_close(found_stream.double(), stream, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double(), normed(stream), rtol=tolerance, atol=tolerance)
    alone = ops.modulated_norm(x, factor, shift, 1e-6)
    torch.testing.assert_close(alone.double(), normed(x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [128, 115, 3])
def test_a_gated_norm_of_what_a_cache_holds_in_bf16(width: int) -> None:
    x, held = torch.randn(3, 50, width), torch.randn(3, 50, width).bfloat16()
    gate, factor, shift = (part.unsqueeze(1) for part in torch.randn(3, 3 * width).chunk(3, dim=1))
    found = ops.gated_norm(x, gate, held, factor, shift, 1e-6)
    expected = ops.gated_norm(x, gate, held.float(), factor, shift, 1e-6)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="what is added to them alike, or stored in bfloat16"):
        ops.gated_norm(x, gate, held.half(), factor, shift, 1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 50, 24), (1, 700), (0, 8)])
def test_linear_in_bf16(shape: tuple[int, ...], bias: bool) -> None:
    x, weight = torch.randn(shape).bfloat16(), torch.randn(130, shape[-1]).bfloat16()
    added = torch.randn(130).bfloat16() if bias else None
    expected = functional.linear(x.double(), weight.double(), added.double() if added is not None else None)
    for operand in (weight, weight.t().contiguous().t()):
        found = ops.linear(x, operand, added)
        torch.testing.assert_close(found, expected.bfloat16(), rtol=8e-3, atol=1e-3)  # one rounding


def test_operators_follow_torchs_rules() -> None:
    now, then = _routing(2, 9, 3, 6), _routing(2, 9, 3, 6)
    weight, threshold, activation = torch.rand(2, 9, 3), torch.rand(2, 6), torch.rand(2, 6, 9)
    x, part = torch.randn(2, 9, 16), torch.randn(2, 1, 16)
    cases = [
        (ops.decide.default, (now, weight, then, weight, weight, threshold, None, 0.7, 0.4, True, None)),
        (ops.threshold.default, (activation, now, 0.65, 0.8, 0.6, False, 1e-5)),
        (ops.update_activation.default, (activation, now, 0.65)),
        (ops.linear.default, (x.bfloat16(), torch.randn(5, 16).bfloat16(), None)),
        (ops.top_k.default, (torch.randn(9, 6), 3)),
        (ops.modulated_norm.default, (x, part, part, 1e-6)),
        (ops.gated_norm.default, (x, part, x, part, part, 1e-6)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
