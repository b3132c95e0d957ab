"""The pipelines that diffusers has for HiDream and Nucleus, under `apply` and `remove`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_fx
from tests.helpers.published_pipelines import hidream_pipeline, nucleus_pipeline, paint
from tests.helpers.requests import SOME

Make = Callable[[], Any]
# The same number of pixels: HiDream's pipeline scales whatever is asked for to one area.
OTHER_SIZES: dict[Make, dict[str, int]] = {
    hidream_pipeline: {"height": 4, "width": 16},
    nucleus_pipeline: {"height": 16, "width": 16},
}
pytestmark = pytest.mark.slow  # `make models`, which CI runs
MAKES = [pytest.param(make, id=make.__name__) for make in OTHER_SIZES]


@cache
def _applied(make: Make) -> Any:
    return moeca_fx.apply(make(), SOME)


@cache
def _alone(make: Make, seed: int, **more: int) -> Tensor:
    """The images of a pipeline that serves one request."""
    return paint(moeca_fx.apply(make(), SOME), seed, **more)


def _counts(pipe: Any) -> tuple[int, int, int]:
    stats = moeca_fx.stats(pipe)
    return stats.full_steps, stats.cached_steps, stats.trajectories


@pytest.mark.parametrize("make", MAKES)
def test_without_a_policy_the_images_are_equal(make: Make) -> None:
    pipe = make()
    wanted = paint(pipe)
    denoiser, kind = pipe.transformer, type(pipe)
    moeca_fx.apply(pipe, policy=None)
    torch.testing.assert_close(paint(pipe), wanted, rtol=1e-5, atol=1e-5)
    unguided = paint(pipe, guidance_scale=1.0)
    assert pipe.transformer is not denoiser and isinstance(pipe.transformer, type(denoiser))
    moeca_fx.remove(pipe)
    assert pipe.transformer is denoiser and type(pipe) is kind
    assert torch.equal(paint(pipe), wanted)
    torch.testing.assert_close(unguided, paint(pipe, guidance_scale=1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MAKES)
def test_requests_reuse_branches_and_leave_nothing_behind(make: Make) -> None:
    """The second of another size, the third as the first."""
    pipe = _applied(make)
    first = paint(pipe)
    stats = moeca_fx.stats(pipe)
    calls = 1 if make is hidream_pipeline else 2  # of the denoiser a step
    assert _counts(pipe) == (2 * calls, 4 * calls, calls)
    assert 0 < stats.recomputed_branches < stats.branches and stats.flops_executed < stats.flops_uncached
    assert not torch.equal(first, paint(make()))

    other = paint(pipe, 3, **OTHER_SIZES[make])
    assert other.shape[-2:] == tuple(OTHER_SIZES[make].values())
    assert torch.equal(other, _alone(make, 3, **OTHER_SIZES[make]))
    assert torch.equal(paint(pipe), first)
    assert _counts(pipe) == (6 * calls, 12 * calls, 3 * calls)


@pytest.mark.parametrize("make", MAKES)
def test_more_images_and_a_callback(make: Make) -> None:
    """Two prompts; what the callback changes reaches the next step."""

    def halve(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] / 2} if step == 1 else {}

    pipe = make()
    wanted = paint(pipe, batch=2, callback_on_step_end=halve)
    plain = paint(pipe, batch=2)
    assert wanted.shape[0] == 2 and not torch.equal(wanted, plain)
    moeca_fx.apply(pipe, policy=None)
    torch.testing.assert_close(paint(pipe, batch=2, callback_on_step_end=halve), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(paint(pipe, batch=2), plain, rtol=1e-5, atol=1e-5)
