"""A planted 1 % error in one expert is caught in every dtype, and honest models raise no alarm."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx.discover import discover
from moeca_fx.discover.scales import OffScale, Sample, check_scales
from moeca_fx.errors import UnprovenRegionError
from tests.helpers.grids import slow
from tests.precision.models import FAULTY, KINDS, Kind, inputs_of, model_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 4), (3, 6), (2, 256))  # samples, tokens; of 16 channels


def proven(kind: Kind, dtype: torch.dtype, size: tuple[int, int], boost: float, seed: int = 0) -> bool:
    model = model_of(kind, dtype, boost, seed=seed)
    return bool(discover(model, inputs_of(dtype, *size, seed=seed), {}).regions)


def _cells() -> list[Any]:
    """In the fast ones, each pair of values meets once."""
    cells = []
    for k, d, s in product(range(len(KINDS)), range(len(DTYPES)), range(len(SIZES))):
        cells.append((pytest.param if s == (k + d) % len(SIZES) else slow)(KINDS[k], DTYPES[d], SIZES[s]))
    return cells


@pytest.mark.parametrize(("kind", "dtype", "size"), _cells(), ids=str)
def test_one_percent_is_caught(kind: Kind, dtype: torch.dtype, size: tuple[int, int]) -> None:
    assert proven(kind, dtype, size, 1.0)
    assert not proven(kind, dtype, size, 1.01)


@pytest.mark.parametrize("kind", ["method", "block"])
def test_other_seeds_and_the_other_sign(kind: Kind) -> None:
    for seed in range(1, 4):
        assert proven(kind, torch.bfloat16, (2, 16), 1.0, seed)
        assert not proven(kind, torch.bfloat16, (2, 16), 0.99, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_transform_names_the_expert_and_its_factor(kind: Kind) -> None:
    with pytest.raises(UnprovenRegionError, match=rf"expert {FAULTY} enters .* 1\.0\d+ times its routing weight"):
        moeca_fx.transform(
            model_of(kind, torch.bfloat16, 1.01), inputs_of(torch.bfloat16, 2, 64), policy=None, compile=False
        )


def test_an_expert_that_no_token_of_the_example_chose_is_looked_at_too() -> None:
    for boost, found in ((1.0, True), (1.01, False)):
        model = model_of("method", boost=boost)
        with torch.no_grad():
            model.storeys[0].layer.compass.bias[FAULTY] = -100.0
        assert bool(discover(model, inputs_of(), {}).regions) == found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_branches_of_honest_rounding_raise_no_alarm(dtype: torch.dtype) -> None:
    """k = 8 of 16 experts, added in the dtype one after the other, weights rounded: the most rounding there is."""
    for seed in range(6):
        experts, sample = _rounded_sum(dtype, seed)
        check_scales(experts, [sample])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_rounding_hides_no_percent(dtype: torch.dtype) -> None:
    for seed in range(6):
        experts, sample = _rounded_sum(dtype, seed, boost=1.01)
        with pytest.raises(OffScale, match="expert 3 enters"):
            check_scales(experts, [sample])


def test_what_is_not_known_is_refused_where_another_reading_was_wrong() -> None:
    experts, sample = _rounded_sum(torch.bfloat16, 0)
    few = Sample(sample.x[:1], sample.expert[:1], sample.weight[:1], sample.routed[:1], sample.rounded[:1])
    check_scales(experts, [few])
    with pytest.raises(OffScale, match="unknown number"):
        check_scales(experts, [few], strict=True)


def _rounded_sum(dtype: torch.dtype, seed: int, boost: float = 1.0) -> tuple[list[nn.Module], Sample]:
    """Experts and a sum as a model in `dtype` makes it; expert 3 is boosted."""
    torch.manual_seed(seed)
    experts: list[nn.Module] = [nn.Linear(64, 64, bias=False).to(dtype) for _ in range(16)]
    x = torch.randn(96, 64).to(dtype)
    weight, ids = torch.randn(96, 16).softmax(-1).topk(8, dim=-1)
    total = torch.zeros_like(x)
    with torch.no_grad():
        for index, expert in enumerate(experts):
            row, place = torch.where(ids == index)
            part: Tensor = expert(x[row]) * weight[row, place, None].to(dtype)
            total.index_add_(0, row, part if index != 3 else part * boost)
    return experts, Sample(x, ids, weight, total.double(), total)
