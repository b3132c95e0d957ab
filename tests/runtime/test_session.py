"""A session: trajectories that are announced, in any order of calls and whatever the timesteps do."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa, NothingReusedWarning, OtherLengthWarning
from moeca_fx.errors import InputError
from moeca_fx.policies import build
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.runtime.session import Ended, Session
from moeca_fx.runtime.timestep import ANNOUNCED
from tests.helpers.toys import Toy, toy_inputs
from tests.helpers.transformed import as_new, toy_pair

EVERY_THIRD = MoECa(interval=3, tau0=0.6)


def _steps(count: int, seed: int = 0, clock: float | None = None) -> list[tuple[Tensor, Tensor]]:
    grid, _ = toy_inputs(2, seed=seed)
    return [(grid * (1 + 0.02 * n), torch.full((2,), 0.1 * n if clock is None else clock)) for n in range(count)]


def _run(fast: TransformedModel, rounds: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """A session of the calls of each step."""
    found = []
    with torch.no_grad(), fast.session() as session:
        for calls in rounds:
            found += [fast(*inputs) for inputs in calls]
            session.next_step()
    return found


def test_a_session_is_what_one_trajectory_is() -> None:
    _, fast = toy_pair(EVERY_THIRD)
    steps = _steps(5)
    found = _run(fast, [[inputs] for inputs in steps])
    as_new(fast)
    with torch.no_grad():
        expected = [fast(*inputs) for inputs in steps]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("clock", [0.5, None], ids=["still", "moving"])
def test_timesteps_do_not_matter(clock: float | None) -> None:
    """Those of a solver with several evaluations a step stand still or jump."""
    _, fast = toy_pair(EVERY_THIRD)
    _run(fast, [[inputs] for inputs in reversed(_steps(6, clock=clock))])
    assert (fast.stats().full_steps, fast.stats().cached_steps, fast.stats().trajectories) == (2, 4, 1)


def test_several_calls_a_step_have_a_trajectory_each() -> None:
    _, fast = toy_pair(EVERY_THIRD)
    one, other = _steps(5), _steps(5, seed=7)
    found = _run(fast, list(zip(one, other, strict=True)))
    as_new(fast)
    expected = []
    with torch.no_grad():
        for pair in zip(one, other, strict=True):
            for name, inputs in zip("ab", pair, strict=True):
                with fast.context(name):
                    expected.append(fast(*inputs))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_at_the_end_nothing_is_held_and_the_next_begins_anew() -> None:
    _, fast = toy_pair(EVERY_THIRD)
    first = _run(fast, [[inputs] for inputs in _steps(2)])
    assert fast.memory().total == 0 and not fast._moeca.trajectories
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), fast.session():
        fast(*_steps(1)[0])
        assert fast.memory().total > 0
        raise KeyboardInterrupt
    assert fast.memory().total == 0
    assert torch.equal(_run(fast, [[inputs] for inputs in _steps(2)])[1], first[1])


def test_restart_begins_new_trajectories() -> None:
    _, fast = toy_pair(EVERY_THIRD)
    steps = _steps(2)
    with torch.no_grad(), fast.session() as session:
        for _ in range(2):
            session.restart()
            for inputs in steps:
                fast(*inputs)
                session.next_step()
    assert (fast.stats().full_steps, fast.stats().cached_steps, fast.stats().trajectories) == (2, 2, 2)


def test_a_session_beside_trajectories_that_are_recognised() -> None:
    _, fast = toy_pair(EVERY_THIRD)
    with torch.no_grad():
        fast(*_steps(2)[0])
        _run(fast, [[inputs] for inputs in _steps(2, seed=3)])
        fast(*_steps(2)[1])
    assert fast.stats().cached_steps == 2 and fast.stats().trajectories == 2


def test_without_any_timestep() -> None:
    """Told that steps are announced, nobody looks for a timestep; calls outside of sessions are refused."""
    fast = moeca_fx.transform(Clockless().eval(), (torch.randn(2, 6, 16),), policy=EVERY_THIRD, timestep=ANNOUNCED)
    with torch.no_grad(), fast.session() as session:
        for step in range(3):
            fast(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(step)))
            session.next_step()
    assert (fast.stats().full_steps, fast.stats().cached_steps) == (1, 2)
    with pytest.raises(InputError, match=r"outside of a session.*with model\.session\(\)"):
        fast(torch.randn(2, 6, 16))


class Clockless(Toy):
    def forward(self, grid: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(grid, torch.zeros_like(grid[:, 0, 0]))


def test_a_run_that_reused_nothing_says_why_once() -> None:
    _, fast = toy_pair(EVERY_THIRD)
    steps = _steps(4)
    with (
        pytest.warns(
            NothingReusedWarning, match=r"a run of 1 steps reused nothing: it had one call: no step was .*next_step"
        ),
        torch.no_grad(),
        fast.session(),
    ):
        for inputs in steps:
            fast(*inputs)
    _run(fast, [[steps[0]]])  # once
    as_new(fast)
    with pytest.warns(NothingReusedWarning, match="it had one call: the run ended"):
        _run(fast, [[steps[0]]])


def test_the_warning_points_at_the_caller(recwarn: pytest.WarningsRecorder) -> None:
    _, fast = toy_pair(EVERY_THIRD)
    _run(fast, [[_steps(1)[0]]])
    assert recwarn.pop(NothingReusedWarning).filename == __file__


@pytest.mark.filterwarnings("error")
def test_guidance_that_ends_early_is_no_reason_to_warn() -> None:
    """The second trajectory reused nothing, and has another length than the policy's; the first one is what counts."""
    policy = build("sublayer_forecast", steps=6, full=(0, 2))
    _, fast = toy_pair(EVERY_THIRD)
    fast = fast.with_policy(policy)
    one, other = _steps(6), _steps(6, seed=7)
    _run(fast, [[one[0], other[0]], *([inputs] for inputs in one[1:])])


def test_a_run_of_another_length_than_the_policy_was_made_for() -> None:
    _, fast = toy_pair(EVERY_THIRD)
    fast = fast.with_policy(build("sublayer_forecast", steps=9, full=(0, 2)))
    with pytest.warns(OtherLengthWarning, match="9 steps, this one ended after 4"):
        _run(fast, [[inputs] for inputs in _steps(4)])


def _session() -> tuple[Session, list[str]]:
    over: list[str] = []

    def end(keys: Sequence[str], why: str) -> list[Ended]:
        over.extend(keys)
        return [Ended(1, why) for _ in keys]

    return Session(1, end), over  # type: ignore[arg-type]


def test_calls_are_told_apart_by_the_tensors_they_share() -> None:
    session, over = _session()
    cond, uncond = torch.zeros(3), torch.zeros(3)

    def step(*texts: Tensor) -> list[str]:
        latents = torch.randn(4)
        keys = [session.key("default", [latents, text]) for text in texts]
        session.next_step()
        return keys

    first, second = step(uncond, cond)
    assert first != second
    assert step(uncond, cond) == [first, second]
    assert step(cond, uncond) == [second, first]  # another order
    assert step(cond) == [second] and over == [first]  # one is left out, and over
    (third, again) = step(uncond, cond)
    assert again == second and third not in (first, second)
    cond.add_(1)  # another content in the same memory: another prompt
    assert step(uncond, cond)[0] == third and second in over


def test_without_shared_tensors_the_order_tells_calls_apart() -> None:
    session, _ = _session()
    keys = []
    for _ in range(3):
        keys.append([session.key("default", [torch.randn(4), 3, None]) for _ in range(2)])
        session.next_step()
    assert keys[0] == keys[1] == keys[2] and len(set(keys[0])) == 2


def test_named_contexts_never_share() -> None:
    session, _ = _session()
    text = torch.zeros(3)
    keys = []
    for names in (("a", "b"), ("b", "a"), ("a",)):
        keys.append({name: session.key(name, [torch.randn(4), text]) for name in names})
        session.next_step()
    assert keys[0] == keys[1] and keys[2] == {"a": keys[0]["a"]} and keys[0]["a"] != keys[0]["b"]


def test_without_steps_what_is_held_is_bounded() -> None:
    session, over = _session()
    keys = [session.key("default", [torch.randn(4)]) for _ in range(40)]
    assert over == keys[:24]
    session.next_step()
    session.next_step()  # nothing in between: not a step
    assert session.steps == 1 and session.calls == 40
    session.close()
    assert over == keys and len(session.ended) == 40
