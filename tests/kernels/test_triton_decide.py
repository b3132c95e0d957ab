"""The decision kernel against `policies.branch.decide`."""

import pytest
import torch
from torch import Tensor

from moeca_fx.policies import branch

pytest.importorskip("triton", reason="triton is not installed")
from moeca_fx.kernels.triton_gpu import decide

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS = 9


def _case(batch: int, tokens: int, top_k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Routing now, slots and thresholds; about half of the branches match, most scores are near the threshold."""
    generator = torch.Generator().manual_seed(top_k)
    shape = (batch, tokens, top_k)
    experts = [torch.rand(batch, tokens, EXPERTS, generator=generator).argsort(-1)[..., :top_k] for _ in range(2)]
    weight = torch.rand(shape, generator=generator).to(dtype)
    then, norm = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator) * 4
    threshold = torch.rand(batch, EXPERTS, generator=generator) + 0.4
    return [tensor.to(DEVICE) for tensor in (experts[0], weight, experts[1], then, norm, threshold)]


def _compare(case: list[Tensor], kind: branch.ScoreWeight = "share") -> Tensor:
    found, expected = decide(*case, 1.1, 0.6, kind), branch.decide(*case, 1.1, 0.6, kind)
    for name, one, other in zip(("slot", "expert", "weight", "code"), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    return found[3]


@pytest.mark.parametrize("kind", ["share", "raw"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 8])
def test_equals_the_reference(top_k: int, kind: branch.ScoreWeight) -> None:
    code = _compare(_case(3, 37, top_k), kind)
    assert 2 in code and (code < 2).any(), "the case must hold matched and unmatched branches"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_lower_precision(dtype: torch.dtype) -> None:
    _compare(_case(2, 20, 5, dtype))


def test_zero_totals_are_shares_of_zero() -> None:
    expert, weight, cached, then, norm, threshold = _case(2, 16, 5)
    weight[0], norm[1] = 0, 0
    _compare([expert, weight, cached, then, norm, threshold])


@pytest.mark.parametrize("level", [-1.0, 9.0])
def test_all_or_no_matched_branch_is_recomputed(level: float) -> None:
    expert, weight, _, then, norm, threshold = _case(2, 16, 5)
    cached = expert.flip(-1)
    code = _compare([expert, weight, cached, then, norm, torch.full_like(threshold, level)])
    assert (code == (1 if level < 0 else 0)).all()


def test_nothing_matches() -> None:
    expert, weight, _, then, norm, threshold = _case(1, 8, 2)
    code = _compare([expert % 4, weight, expert % 4 + 4, then, norm, threshold])
    assert (code == 2).all()


def test_a_score_equal_to_its_threshold_is_reused() -> None:
    expert, weight, _, _, norm, threshold = _case(1, 8, 1)
    weight.fill_(0.5)
    code = _compare([expert, weight, expert, weight, torch.zeros_like(norm), torch.full_like(threshold, 0.5)], "raw")
    assert (code == 0).all()


def test_rows_as_samples_of_one_token() -> None:
    expert, weight, cached, then, norm, threshold = _case(11, 1, 5)
    _compare([expert, weight, cached, then, norm, threshold])


def test_no_rows() -> None:
    case = [tensor[:0] for tensor in _case(1, 4, 5)]
    assert all(tensor.shape == (0, 4, 5) for tensor in decide(*case, 1.1, 0.6, "share"))
