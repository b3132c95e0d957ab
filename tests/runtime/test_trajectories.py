"""When a new trajectory begins: recognised from what a call looks like, never from the number of steps."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moeca_fx import MoECa
from moeca_fx.errors import InputError
from tests.helpers.toys import TOKENS, WIDTH, toy_inputs
from tests.helpers.transformed import run, toy_pair

pytestmark = pytest.mark.filterwarnings("ignore::moeca_fx.NothingReusedWarning")


def _call(clock: float | Sequence[float], batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    grid, _ = toy_inputs(batch, seed=seed)
    values = [clock] * batch if isinstance(clock, float | int) else list(clock)
    return grid, torch.tensor(values, dtype=torch.float32)


def _kinds(calls: Sequence[tuple[Tensor, Tensor]], policy: MoECa | None = None) -> str:
    """One letter a call: T a full step that begins a trajectory, f another full step, c a cached one."""
    _, fast = toy_pair(policy or MoECa(interval=3))
    kinds, cached_before = "", 0
    for inputs in calls:
        run(fast, [inputs])
        now = fast._moeca.trajectories["default"]
        if now.step == 1:
            kinds, cached_before = kinds + "T", 0
        else:
            kinds += "c" if now.cached_steps > cached_before else "f"
        cached_before = now.cached_steps
    return kinds


@pytest.mark.parametrize("sign", [1, -1], ids=["ascending", "descending"])
def test_one_run_of_any_length(sign: int) -> None:
    clocks = [500 + sign * 20.0 * step for step in range(8)]
    assert _kinds([_call(clock) for clock in clocks]) == "TccfccfcT"[:8]


@pytest.mark.parametrize("sign", [1, -1], ids=["ascending", "descending"])
def test_a_jump_back_begins_a_new_one(sign: int) -> None:
    clocks = [500 + sign * 20.0 * step for step in range(4)]
    assert _kinds([_call(clock) for clock in [*clocks, *clocks, *clocks[:2]]]) == "TccfTccfTc"


def test_another_run_from_the_last_timestep_on() -> None:
    """The first call of the next run is further back than the last of this one, however few steps were made."""
    assert _kinds([_call(c) for c in (0.0, 0.5, 0.0, 0.5)]) == "TcTc"


def test_the_end_of_one_run_equals_the_begin_of_the_next_only_by_reset() -> None:
    _, fast = toy_pair(MoECa(interval=3))
    run(fast, [_call(0.0), _call(0.5)])
    fast.reset()
    run(fast, [_call(0.5), _call(0.9)])
    stats = fast.stats()
    assert (stats.trajectories, stats.full_steps, stats.cached_steps) == (2, 2, 2)


def test_batch_change() -> None:
    assert _kinds([_call(0.0), _call(0.1), _call(0.2, batch=3), _call(0.3, batch=3), _call(0.4)]) == "TcTcT"


def test_dtype_change_of_an_input() -> None:
    """The timestep in fp64: the original runs on it, in its own way."""
    _, fast = toy_pair(MoECa(interval=3))
    run(fast, [_call(0.0), _call(0.1)])
    with pytest.raises(InputError, match="cannot run on"):
        fast(_call(0.2)[0], _call(0.2)[1].double())


def test_shape_change() -> None:
    model, fast = toy_pair(MoECa(interval=3))
    short = torch.randn(2, TOKENS - 2, WIDTH)
    run(fast, [_call(0.0), _call(0.1)])
    (found,) = run(fast, [(short, torch.tensor([0.2, 0.2]))])
    with torch.no_grad():
        torch.testing.assert_close(found, model(short, torch.tensor([0.2, 0.2])))
    stats = fast.stats()
    assert (stats.trajectories, stats.full_steps, stats.cached_steps) == (2, 2, 1)


def test_equal_timesteps_at_the_start_are_two_runs() -> None:
    """Two calls a step without contexts: their states must not mix, so the next step is full, and all if it repeats."""
    assert _kinds([_call(c) for c in (0.0, 0.0, 0.1, 0.2)]) == "TTfc"
    assert _kinds([_call(c) for c in (0.0, 0.0, 0.1, 0.1, 0.2, 0.2)]) == "TTffff"


def test_pairs_of_equal_timesteps_go_on_once_the_direction_is_known() -> None:
    """A second-order sampler evaluates t0, t1, t1, t2, t2, ...; every evaluation is a step."""
    assert _kinds([_call(c) for c in (0.0, 0.1, 0.1, 0.2, 0.2, 0.3)]) == "TccfccT"[:6]
    assert _kinds([_call(c) for c in (0.9, 0.8, 0.8, 0.7, 0.7, 0.6)]) == "TccfccT"[:6]


def test_timesteps_of_samples_may_differ() -> None:
    assert _kinds([_call([0.0, 0.5]), _call([0.1, 0.6]), _call([0.2, 0.7])]) == "Tcc"
    assert _kinds([_call([0.0, 0.5]), _call([0.1, 0.6]), _call([0.2, 0.5])]) == "TcT"  # one sample jumped back


def test_interval_one_makes_every_step_full() -> None:
    assert _kinds([_call(c) for c in (0.0, 0.1, 0.2, 0.0, 0.1)], MoECa(interval=1)) == "TffTf"


def test_reset_of_one_context_and_of_all() -> None:
    _, fast = toy_pair(MoECa(interval=3))
    for name in ("a", "b"):
        with fast.context(name):
            run(fast, [_call(0.0), _call(0.1)])
    fast.reset("a")
    assert fast.cache("a") == {} and fast.cache("b") != {}
    fast.reset("unknown")
    fast.reset()
    assert fast.cache("b") == {} and fast.memory().total == 0


def test_nested_contexts_return_to_the_outer_one() -> None:
    _, fast = toy_pair(MoECa(interval=3))
    with fast.context("outer"):
        run(fast, [_call(0.0)])
        with fast.context("inner"):
            run(fast, [_call(0.5)])
        run(fast, [_call(0.1)])
    assert fast.stats().cached_steps == 1
    assert set(fast._moeca.trajectories) == {"outer", "inner"}


def test_nan_in_a_cached_run_is_refused_and_the_run_begins_anew() -> None:
    model, fast = toy_pair(MoECa(interval=3))
    run(fast, [_call(0.0), _call(0.1)])
    with fast.context("bystander"):
        run(fast, [_call(0.0), _call(0.1)])
    grid, when = _call(0.2)
    grid[1, 2, 3] = float("nan")
    with pytest.raises(
        InputError, match=r"input 0 .* found 1 of 192 that are NaN or infinite; the trajectory was reset"
    ):
        fast(grid, when)
    with pytest.raises(InputError, match="input 1"):
        fast(*(_call(0.0)[0], torch.tensor([0.0, float("inf")])))
    assert fast.cache() == {} and fast.cache("bystander") != {}
    good = _call(0.3)
    (found,) = run(fast, [good])
    with torch.no_grad():
        torch.testing.assert_close(found, model(*good))
    with fast.context("bystander"):
        run(fast, [_call(0.2)])
    stats = fast.stats()
    assert (stats.full_steps, stats.cached_steps, stats.trajectories) == (3, 3, 3)


def test_an_exception_in_the_middle_resets_that_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = toy_pair(MoECa(interval=3))
    expected = run(fast, [_call(0.0), _call(0.1), _call(0.2)])
    fast.reset()
    for name in ("broken", "sound"):
        with fast.context(name):
            run(fast, [_call(0.0), _call(0.1)])
    program = fast._moeca.trajectories["broken"].program
    assert program.graphs is not None

    def fail(*args: Tensor) -> None:
        args[2].zero_()  # half of a step: a cache is written, then it stops
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, fast.context("broken"):
        patch.setattr(program.graphs.cached, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            run(fast, [_call(0.2)])
    assert fast.cache("broken") == {}
    with fast.context("sound"):
        assert torch.equal(run(fast, [_call(0.2)])[0], expected[2])
    with fast.context("broken"):
        again = run(fast, [_call(0.0), _call(0.1), _call(0.2)])
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
