"""Requests: each begins anew and frees its caches, whatever its size, its end, and whoever shares its parts."""

import logging
import threading
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa, NothingReusedWarning
from moeca_fx.errors import ConfigError
from tests.helpers.grids import slow
from tests.helpers.pipelines import TextPipeline, dit_pipeline, prompts, text_pipeline
from tests.helpers.requests import SOME, draw, write


@pytest.fixture(scope="module")
def pipe() -> TextPipeline:
    """One that many requests were made of; each test makes its own."""
    return moeca_fx.apply(text_pipeline(), SOME)


def _fresh(policy: MoECa = SOME) -> TextPipeline:
    return moeca_fx.apply(text_pipeline(), policy)


def _held(pipe: Any) -> int:
    """Bytes of cache."""
    fast = vars(pipe)["_moeca_application"].denoiser.fast
    assert fast is not None
    return int(fast.memory().total)


def _counts(pipe: Any) -> tuple[int, int, int]:
    stats = moeca_fx.stats(pipe)
    return stats.full_steps, stats.cached_steps, stats.trajectories


class _Stop(Exception):
    pass


def test_requests_of_other_sizes_one_after_the_other(pipe: TextPipeline) -> None:
    sizes: list[dict[str, Any]] = [{}, {"height": 8}, {"batch": 3}, {"steps": 9}, {"negative_prompt_embeds": None}, {}]
    found = [write(pipe, seed=4, **size) for size in sizes]
    for ours, size in zip(found, sizes, strict=True):
        if size != sizes[-1]:
            assert torch.equal(ours, write(_fresh(), seed=4, **size)), size
        assert _held(pipe) == 0
    assert torch.equal(found[0], found[-1])


def test_batched_guidance_on_and_off() -> None:
    pipe = moeca_fx.apply(dit_pipeline(), SOME)
    sizes: list[dict[str, Any]] = [{}, {"guidance_scale": 1.0}, {"labels": (1, 2, 3)}, {}]
    found = [draw(pipe, **size) for size in sizes]
    assert torch.equal(found[0], found[-1])
    assert _counts(pipe) == (4 * 2, 4 * 4, 4)


@pytest.mark.parametrize("error", [_Stop, KeyboardInterrupt])
def test_an_exception_in_the_middle_and_a_good_run(pipe: TextPipeline, error: type[BaseException]) -> None:
    expected = write(pipe, seed=2)

    def stop(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        assert _held(pipe) > 0
        if step == 2:
            raise error
        return given

    with pytest.raises(error):
        write(pipe, seed=3, callback_on_step_end=stop)
    assert _held(pipe) == 0 and type(pipe.scheduler) is DDIMScheduler
    assert torch.equal(write(pipe, seed=2), expected)


def test_an_exception_in_the_denoiser_and_a_good_run(pipe: TextPipeline) -> None:
    expected = write(pipe, seed=2)

    def spoil(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] * float("nan")} if step == 2 else given

    with pytest.raises(moeca_fx.errors.InputError, match="NaN"):
        write(pipe, seed=2, callback_on_step_end=spoil)
    assert _held(pipe) == 0
    assert torch.equal(write(pipe, seed=2), expected)


@pytest.mark.filterwarnings("error::moeca_fx.NothingReusedWarning", "error::moeca_fx.OtherLengthWarning")
def test_an_interrupted_request_ends_without_a_warning(pipe: TextPipeline) -> None:
    expected = write(pipe)

    def interrupt(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        _pipe._interrupt = step == 0
        return given

    before = _counts(pipe)
    fresh = _fresh()
    write(fresh, callback_on_step_end=interrupt)
    assert _counts(fresh) == (2, 0, 2)
    write(pipe, callback_on_step_end=interrupt)
    assert _counts(pipe)[0] - before[0] == 2 and _held(pipe) == 0
    assert torch.equal(write(pipe), expected)


def test_what_a_callback_changes_reaches_the_next_step(pipe: TextPipeline) -> None:
    def halve(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] / 2} if step == 1 else {}

    plain = text_pipeline()
    expected = write(plain, callback_on_step_end=halve)
    assert not torch.equal(expected, write(plain))
    exact = moeca_fx.apply(plain, policy=None)
    torch.testing.assert_close(write(exact, callback_on_step_end=halve), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(write(pipe, callback_on_step_end=halve), write(_fresh(), callback_on_step_end=halve))


def test_named_calls_have_a_trajectory_each(pipe: TextPipeline) -> None:
    expected = write(pipe)
    before = _counts(pipe)
    assert torch.equal(write(pipe, names=True), expected)
    assert torch.equal(write(pipe, negative_first=True), expected)
    assert _counts(pipe)[2] - before[2] == 4


def test_guidance_that_comes_and_goes_does_not_mix_prompts(pipe: TextPipeline) -> None:
    """The second call changes nothing about the first, whose trajectory is what it would be alone."""
    part = {
        "guided": lambda step: step in (2, 3),
        "guidance_scale": 1.0,
    }  # a scale of 1: the result is the first call's
    expected = write(pipe, negative_prompt_embeds=None)
    for order in ({}, {"negative_first": True}, {"negative_first": True, "names": True}):
        found = write(pipe, **part, **order)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_scheduler_given_within_a_request_is_heard(pipe: TextPipeline) -> None:
    """A callback may exchange it; the old one is left as it was, and the new one at the end."""
    old, new = pipe.scheduler, DDIMScheduler()

    def exchange(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            new.set_timesteps(len(old.timesteps))
            _pipe.scheduler = new
        return given

    before = _counts(pipe)
    write(pipe, callback_on_step_end=exchange)
    now = _counts(pipe)
    # The new timesteps were set before the pipeline had the scheduler: its trajectories go on.
    assert (now[0] - before[0], now[1] - before[1], now[2] - before[2]) == (4, 8, 2)
    assert type(old) is type(new) is DDIMScheduler
    assert "_moeca_listeners" not in vars(old) | vars(new)
    pipe.scheduler = old


def test_a_pipeline_that_starts_over_begins_new_trajectories(pipe: TextPipeline) -> None:
    """Setting timesteps again within a request, as pipelines of two stages do."""

    def again(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            _pipe.scheduler.set_timesteps(6)
        return given

    before = _counts(pipe)
    write(pipe, callback_on_step_end=again)
    assert _counts(pipe)[2] - before[2] == 4


def test_two_pipelines_that_share_a_transformer_and_a_scheduler() -> None:
    """The second one's requests run inside of the first one's."""
    first = text_pipeline()
    second = TextPipeline(**first.components)
    model = first.transformer
    moeca_fx.apply(first, SOME)
    third = TextPipeline(**first.components)  # it was given the first one's stand-in
    moeca_fx.apply(second, MoECa(interval=2))
    expected, other = write(first), write(second, seed=3)
    assert torch.equal(write(third), write(text_pipeline()))  # no policy of its own: the plain model
    moeca_fx.apply(third, MoECa(interval=2))
    second.scheduler = third.scheduler = type(second.scheduler)()
    found: list[Tensor] = []

    def nested(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        if step in (0, 3):
            found.append(write(second if step else third, seed=3))
        return given

    assert torch.equal(write(first, callback_on_step_end=nested), expected)
    assert all(torch.equal(inner, other) for inner in found) and len(found) == 2
    assert _counts(first) == (8, 16, 4)
    shown = first.transformer
    moeca_fx.remove(first)
    assert torch.equal(write(second, seed=3), other) and torch.equal(write(third, seed=3), other)
    moeca_fx.remove(third)
    moeca_fx.remove(second)
    assert first.transformer is second.transformer is model
    assert third.transformer is shown  # what it held
    assert torch.equal(write(third), write(text_pipeline()))


@pytest.mark.parametrize("heights", [(4,), slow((4, 8))], ids=str)
def test_two_pipelines_in_two_threads(heights: tuple[int, ...]) -> None:
    """They share a model, and both make their first requests at once."""
    policies = (SOME, MoECa(interval=2))
    expected = [[write(pipe, height=height) for height in heights] for pipe in map(_fresh, policies)]
    shared = text_pipeline()
    pipes = [moeca_fx.apply(TextPipeline(shared.transformer, DDIMScheduler()), policy) for policy in policies]
    found: list[list[Tensor]] = [[], []]

    def work(index: int) -> None:
        found[index] += [write(pipes[index], height=height) for height in heights]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_remove_and_apply_within_a_request_are_refused(pipe: TextPipeline) -> None:
    def meddle(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(ConfigError, match="within a request"):
            moeca_fx.remove(_pipe)
        with pytest.raises(ConfigError, match="applied to this pipeline already"):
            moeca_fx.apply(_pipe)
        return given

    expected = write(pipe)
    assert torch.equal(write(pipe, callback_on_step_end=meddle), expected)


def test_a_move_within_a_request_begins_anew() -> None:
    pipe = _fresh()

    def widen(_pipe: Any, step: int, _t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            _pipe.to(torch.float64)
            _pipe.to(torch.float32)
        return given

    write(pipe, callback_on_step_end=widen)
    assert _counts(pipe) == (2, 4, 2) and _held(pipe) == 0  # of the three steps after the move


def test_the_log_tells_what_a_request_saved(caplog: pytest.LogCaptureFixture) -> None:
    pipe = moeca_fx.apply(dit_pipeline(), SOME)
    with caplog.at_level(logging.INFO, logger="moeca_fx.pipeline"):
        draw(pipe, steps=5)
        draw(pipe, steps=9)
    lines = [record.getMessage() for record in caplog.records if record.name == "moeca_fx.pipeline"]
    assert lines[0] == "TinyMoE: transforming at its first call"
    assert lines[1].startswith("DiTPipeline: request 1: 5 steps, 5 calls of TinyMoE, 2 in full and 3 with reuse; ")
    assert lines[2].startswith("DiTPipeline: request 2: 9 steps, 9 calls of TinyMoE, 3 in full and 6 with reuse; ")
    stats = moeca_fx.stats(pipe)
    assert stats.flops_saved > 0
    saved = [float(line.split(", ")[-1].removesuffix("% saved")) for line in lines[1:]]
    assert min(saved) - 0.1 < 100 * stats.flops_saved / stats.flops_uncached < max(saved) + 0.1


def test_a_request_that_reused_nothing_says_why_once() -> None:
    pipe = moeca_fx.apply(text_pipeline(), MoECa(interval=1))
    with pytest.warns(NothingReusedWarning, match="a run of 6 steps reused nothing: interval=1") as caught:
        write(pipe)
        write(pipe)
    assert len([item for item in caught if item.category is NothingReusedWarning]) == 1
    assert caught[0].filename.endswith("requests.py")  # who called the pipeline


def test_a_scheduler_that_is_never_stepped_is_told() -> None:
    pipe = _fresh()
    step, pipe.scheduler = pipe.scheduler, _Around(pipe.scheduler)
    pipe._other = step  # what the pipeline holds besides, and steps not
    with pytest.warns(NothingReusedWarning, match="no step was announced between its calls: .* its scheduler's step"):
        write(pipe)


class _Around:
    """Steps a scheduler's copy out of hearing."""

    def __init__(self, scheduler: Any) -> None:
        self._inner = type(scheduler).from_config(scheduler.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_prompts_of_another_length(pipe: TextPipeline) -> None:
    long = {name: torch.cat([text, text], 1) for name, text in prompts().items()}
    assert torch.equal(write(pipe, **long), write(_fresh(), **long))
