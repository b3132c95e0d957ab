"""moeca::experts and moeca::expert_choice run the region they stand for, and only while that region is open."""

import pytest
import torch
from torch import Tensor

from moeca_fx.ops import expert_choice, experts, live_regions


def _region(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    return x * (expert.to(x.dtype) * weight).sum(-1, keepdim=True)


def _operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 6), torch.randint(0, 3, (4, 2)), torch.rand(4, 2)


def test_runs_the_open_region() -> None:
    operands = _operands()
    with live_regions({"a": _region, "b": lambda x, expert, weight: x}):
        assert torch.equal(experts(*operands, "a"), _region(*operands))
        assert torch.equal(experts(*operands, "b"), operands[0])


def test_opcheck_where_experts_choose() -> None:
    x, token, weight = torch.randn(2, 5, 6), torch.randint(0, 5, (2, 3, 4)), torch.rand(2, 3, 4)
    with live_regions({"a": lambda rows, ids, share: rows * share.sum() + ids.sum()}):
        for rows in (x, x.flatten(0, 1)):
            torch.library.opcheck(torch.ops.moeca.expert_choice.default, (rows, token, weight, "a"))
            assert expert_choice(rows, token, weight, "a").shape == rows.shape


def test_opcheck() -> None:
    with live_regions({"a": _region}):
        torch.library.opcheck(torch.ops.moeca.experts.default, (*_operands(), "a"))


def test_closes_its_regions_also_when_the_block_raises() -> None:
    with pytest.raises(ZeroDivisionError), live_regions({"a": _region}):
        _ = 1 / 0
    with pytest.raises(KeyError):
        experts(*_operands(), "a")
    with live_regions({"a": _region}):
        experts(*_operands(), "a")


def test_a_key_is_opened_once() -> None:
    with live_regions({"a": _region}):
        with pytest.raises(AssertionError, match="already open"), live_regions({"a": _region, "b": _region}):
            pytest.fail("the block must not run")
        experts(*_operands(), "a")
