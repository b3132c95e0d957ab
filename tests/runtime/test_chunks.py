"""Calls in chunks and caches with a limit: the results of one call, true statistics, bounded memory."""

import warnings
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import CacheLimitWarning, MoECa, policies
from moeca_fx.errors import ConfigError, UnsupportedModelError
from moeca_fx.policies import Method
from moeca_fx.runtime.chunks import Chunk, split_batch
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.sample_axes import cut, plain_axes
from tests.helpers import zoo_models
from tests.helpers.toys import WIDTH, Toy, toy, toy_inputs
from tests.helpers.transformed import SOME, run

BATCH, STEPS = 5, 6


@pytest.fixture(autouse=True)
def _no_other_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheLimitWarning)
        yield


@cache
def _model(**options: int | str) -> TransformedModel:
    return moeca_fx.transform(zoo_models.tiny_dsmoe(), zoo_models.inputs(), policy=SOME, **options)  # type: ignore[arg-type]


def _fresh(policy: Method | None = SOME, **options: int | str) -> TransformedModel:
    return _model(**options).with_policy(policy)


def _steps(batch: int = BATCH, steps: int = STEPS) -> list[tuple[Tensor, ...]]:
    return list(zoo_models.trajectory(batch, steps))


@cache
def _per_sample() -> int:
    return moeca_fx.estimate_memory(zoo_models.tiny_dsmoe(), zoo_models.inputs(), policy=SOME, batch=1).total


def test_how_a_batch_is_split() -> None:
    assert split_batch(5, 5, None) == (Chunk(0, 5),)
    assert split_batch(5, 5, 8) == (Chunk(0, 5),)
    assert split_batch(5, 5, 2) == (Chunk(0, 2), Chunk(2, 4), Chunk(4, 5))
    assert split_batch(5, 3, None) == (Chunk(0, 3), Chunk(3, 5, cached=False))
    assert split_batch(5, 3, 2) == (Chunk(0, 2), Chunk(2, 3), Chunk(3, 5, cached=False))
    assert split_batch(2, 3, None) == (Chunk(0, 2),)


def test_inputs_without_the_batch_are_passed_on() -> None:
    x, table, scalar = torch.randn(4, 2), torch.randn(7, 2), torch.tensor(1.0)
    leaves = [x, table, scalar, "text", None]
    found = cut(leaves, plain_axes(leaves, 4), 1, 2)
    assert torch.equal(found[0], x[1:3]) and found[1] is table and found[2] is scalar and found[3:] == ["text", None]


@pytest.mark.parametrize("chunk", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3))])
@pytest.mark.parametrize("policy", [SOME, policies.build("taylorseer"), None], ids=["moeca", "taylorseer", "none"])
def test_results_and_statistics_are_those_of_one_call(chunk: int, policy: Method | None) -> None:
    whole, parts = _fresh(policy), _fresh(policy, chunk=chunk)
    for have, want in zip(run(parts, _steps()), run(whole, _steps()), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    have, want = parts.stats(), whole.stats()
    for name in ("full_steps", "cached_steps", "trajectories", "branches", "matched_branches", "recomputed_branches"):
        assert getattr(have, name) == getattr(want, name), name
    assert have.flops_uncached == want.flops_uncached and have.samples_left_out == 0
    # Row attention pads every sample's rows to the largest number in its chunk.
    assert have.flops_executed <= want.flops_executed < 1.05 * have.flops_executed
    assert parts.memory() == whole.memory()
    assert {name: value.shape for name, value in parts.cache().items()} == {
        name: value.shape for name, value in whole.cache().items()
    }


def test_an_adaptive_schedule_decides_for_every_chunk_and_a_call_counts_once() -> None:
    fast = _fresh(policies.build("teacache", steps=STEPS, threshold=0.3), chunk=2)
    run(fast, _steps())
    stats = fast.stats()
    assert stats.full_steps + stats.cached_steps == STEPS and stats.trajectories == 1


def test_another_batch_begins_every_chunk_anew() -> None:
    """The first chunk has as many samples as before, perhaps not the same ones."""
    fast = _fresh(chunk=2)
    steps = _steps(4, 3)
    run(fast, steps[:2])
    assert len(fast._moeca.trajectories) == 2
    smaller = [tuple(leaf[:2] for leaf in steps[2])]
    (found,) = run(fast, smaller)
    (expected,) = run(zoo_models.tiny_dsmoe(), smaller)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(fast._moeca.trajectories) == 1 and fast.stats().full_steps == 2


def test_contexts_and_resets_take_all_chunks() -> None:
    fast = _fresh(chunk=2)
    for name in ("cond", "uncond"):
        with fast.context(name):
            run(fast, _steps(steps=2))
    assert len(fast._moeca.trajectories) == 6 and fast.stats().trajectories == 2
    assert fast.cache("cond")["blocks.1.mlp.feature"].shape[0] == BATCH
    fast.reset("cond")
    assert fast.cache("cond") == {} and len(fast._moeca.trajectories) == 3
    fast.reset()
    assert fast.memory().total == 0


# -- a limit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_samples_beyond_the_limit_are_exact_and_the_cache_stays_below(chunk: int | None) -> None:
    limit = int(2.5 * _per_sample())
    options: dict[str, int | str] = {"cache_limit": limit} if chunk is None else {"cache_limit": limit, "chunk": chunk}
    fast = _fresh(**options)  # type: ignore[arg-type]
    with pytest.warns(
        CacheLimitWarning, match=r"cache_limit holds 2 samples; the other 3 .*sample batches of at most 2"
    ):
        found = run(fast, _steps())
    exact, cached = run(zoo_models.tiny_dsmoe(), _steps()), run(_fresh(), _steps())
    for have, full, reused in zip(found, exact, cached, strict=True):
        torch.testing.assert_close(have[:2], reused[:2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(have[2:], full[2:], rtol=1e-4, atol=1e-4)
    memory, stats = fast.memory(), fast.stats()
    assert memory.batch == 2 and memory.total == 2 * _per_sample() <= limit
    assert (stats.full_steps, stats.cached_steps, stats.trajectories) == (2, 4, 1)
    assert stats.samples_left_out == 3 * STEPS and "18 samples of these calls computed in full" in str(stats)
    whole = _fresh()
    run(whole, _steps())
    assert stats.flops_uncached == whole.stats().flops_uncached
    assert whole.stats().flops_executed < stats.flops_executed < stats.flops_uncached


def test_a_limit_that_holds_everything_changes_nothing() -> None:
    fast = _fresh(cache_limit="1GB")
    for have, want in zip(run(fast, _steps()), run(_fresh(), _steps()), strict=True):
        assert torch.equal(have, want)


def test_fewer_bits_let_more_samples_in() -> None:
    limit = int(2.5 * _per_sample())
    fast = _fresh(cache_limit=limit, cache_dtype="fp8")
    run(fast, _steps())  # no warning
    assert fast.memory().batch == BATCH and fast.memory().total <= limit


def test_a_limit_below_one_sample() -> None:
    with pytest.raises(ConfigError, match=rf"cache_limit: expected at least {_per_sample()} bytes.*found 1000;"):
        moeca_fx.transform(zoo_models.tiny_dsmoe(), zoo_models.inputs(), policy=SOME, cache_limit="1kB")
    with pytest.raises(ConfigError, match="cache_limit: expected at least"):
        _model(cache_limit=_per_sample()).with_policy(policies.build("branch_forecast", order=2))


@pytest.mark.parametrize("value", [0, -1, "", "3x", "MB", True, float("nan"), float("inf"), [1]])
def test_limits_that_are_none(value: object) -> None:
    with pytest.raises(ConfigError, match="cache_limit: expected bytes >= 1 or a size such as '500MB', found"):
        moeca_fx.transform(toy(), toy_inputs(), cache_limit=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -2, 1.5, "4", True])
def test_chunks_that_are_none(value: object) -> None:
    with pytest.raises(ConfigError, match="chunk: expected an integer >= 1, found"):
        moeca_fx.transform(toy(), toy_inputs(), chunk=value)  # type: ignore[arg-type]


class _WithMean(Toy):
    """A second result that is no sample's own."""

    def forward(self, grid: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(grid, clock)
        return out, out.reshape(-1, WIDTH).mean(0)


def test_a_result_without_a_batch_axis_cannot_be_put_together() -> None:
    model = _WithMean().eval().requires_grad_(False)
    fast = moeca_fx.transform(model, toy_inputs(), policy=MoECa(), chunk=2)
    with torch.no_grad():
        fast(*toy_inputs(2))
        with pytest.raises(
            UnsupportedModelError, match=r"output 1 of the model: expected samples along its first axis"
        ):
            fast(*toy_inputs(3))
