"""Any scheduler: one trajectory a request, however many evaluations a step it makes, and no trace of being watched."""

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import moeca_fx
from moeca_fx.errors import ConfigError
from moeca_fx.pipelines.schedulers import is_scheduler, unwatch, watch
from tests.helpers.pipelines import TextPipeline, dit_pipeline, prompts, text_pipeline
from tests.helpers.requests import SOME, draw, noise, write
from tests.helpers.zoo_models import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with numpy 2

STEPS = 6
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++": lambda: DPMSolverMultistepScheduler(solver_order=2),
    "unipc": UniPCMultistepScheduler,
    "pndm": lambda: PNDMScheduler(skip_prk_steps=False),
    "flow euler": FlowMatchEulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "kdpm2": KDPM2DiscreteScheduler,
    "flow heun": FlowMatchHeunDiscreteScheduler,
}


@pytest.fixture(scope="module")
def plain() -> TextPipeline:
    return text_pipeline()


@pytest.fixture(scope="module")
def exact(plain: TextPipeline) -> TextPipeline:
    return moeca_fx.apply(copy.deepcopy(plain), policy=None)


@pytest.fixture(scope="module")
def cached(plain: TextPipeline) -> TextPipeline:
    return moeca_fx.apply(copy.deepcopy(plain), SOME)


def _by_hand(pipe: TextPipeline, scheduler: Any) -> torch.Tensor:
    """The request as a loop of one's own, with a context for each of the two calls and no pipeline."""
    text = prompts(1, 0)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 4, 4, generator=noise(0))
    latents = latents * scheduler.init_noise_sigma
    first = scheduler.timesteps[0].expand(1).to(latents.dtype)
    example = {"hidden_states": latents, "timestep": first, "encoder_hidden_states": text["prompt_embeds"]}
    fast = moeca_fx.transform(copy.deepcopy(pipe.transformer), (), example, SOME)
    with torch.no_grad(), fast.session() as session:
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, t)
            both = []
            for name, embeds in text.items():
                with fast.context(name):
                    both.append(fast(scaled, t.expand(1).to(latents.dtype), encoder_hidden_states=embeds).sample)
            session.next_step()
            latents = scheduler.step(both[1] + 3.0 * (both[0] - both[1]), t, latents).prev_sample
    return latents


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name: str, plain: TextPipeline, exact: TextPipeline, cached: TextPipeline) -> None:
    """Replaced after `apply`, between requests; its evaluations are one trajectory for each of the two calls."""
    make = SCHEDULERS[name]
    for pipe in (plain, exact, cached):
        pipe.scheduler = make()
    expected = write(plain, STEPS)
    assert relative_error(write(exact, STEPS), expected) < 1e-5
    before = moeca_fx.stats(cached)
    found = write(cached, STEPS)
    after = moeca_fx.stats(cached)
    evaluations = len(cached.scheduler.timesteps)
    assert evaluations == {"heun": 11, "kdpm2": 11, "flow heun": 11, "pndm": 15}.get(name, STEPS)
    full = -(-evaluations // 4)
    assert after.trajectories - before.trajectories == 2
    assert after.full_steps - before.full_steps == 2 * full
    assert after.cached_steps - before.cached_steps == 2 * (evaluations - full)
    assert not torch.equal(found, expected)
    assert torch.equal(write(cached, STEPS), found)  # the next request begins anew
    assert type(cached.scheduler) is type(make())


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_a_request_is_the_loop_by_hand(name: str, plain: TextPipeline, cached: TextPipeline) -> None:
    cached.scheduler = SCHEDULERS[name]()
    assert torch.equal(write(cached, STEPS), _by_hand(plain, SCHEDULERS[name]()))


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_batched_guidance_is_one_call_a_step(name: str) -> None:
    pipe = moeca_fx.apply(dit_pipeline(SCHEDULERS[name]()), SOME)
    found = draw(pipe)
    stats = moeca_fx.stats(pipe)
    assert (stats.full_steps, stats.cached_steps, stats.trajectories) == (2, 4, 1)
    assert torch.equal(draw(pipe), found)


class _Ear:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def stepped(self) -> None:
        self.heard.append("step")

    def timesteps_set(self) -> None:
        self.heard.append("set")


def test_watching_leaves_no_trace() -> None:
    scheduler, ears = DDIMScheduler(), (_Ear(), _Ear())
    before, step = dict(vars(scheduler)), inspect.signature(scheduler.step)
    for ear in ears:
        watch(scheduler, ear)
    assert isinstance(scheduler, DDIMScheduler) and type(scheduler).__name__ == "DDIMScheduler"
    assert inspect.signature(scheduler.step) == step
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 4, 4)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert [ear.heard for ear in ears] == [["set", "step"]] * 2
    unwatch(scheduler, ears[0])
    scheduler.step(x, scheduler.timesteps[1], x)
    assert [len(ear.heard) for ear in ears] == [2, 3]
    unwatch(scheduler, ears[1])
    unwatch(scheduler, ears[1])
    assert type(scheduler) is DDIMScheduler and vars(scheduler).keys() == before.keys()


def test_a_copy_steps_itself_and_is_heard() -> None:
    """Pipelines copy their scheduler for a second stream; a bound method would step the original."""
    scheduler, ear = EulerDiscreteScheduler(), _Ear()
    watch(scheduler, ear)
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(4)
    x = torch.randn(1, 4, 4, 4)
    twin.step(x, twin.timesteps[0], x)
    assert ear.heard == ["set", "step"] and twin.step_index == 1 and scheduler.step_index is None
    unwatch(scheduler, ear)
    twin.step(x, twin.timesteps[1], x)
    assert ear.heard == ["set", "step"]


def test_what_is_a_scheduler() -> None:
    assert is_scheduler(DDIMScheduler())
    assert not any(is_scheduler(value) for value in (None, 3, "step", torch.nn.Linear(1, 1), {"step": 1}))


def test_a_pipeline_without_a_scheduler_is_told_so() -> None:
    pipe = text_pipeline()
    pipe.scheduler = None
    with pytest.raises(ConfigError, match=r"TextPipeline.*no scheduler"):
        moeca_fx.apply(pipe, SOME)
