"""Full steps equal the original on every family; a sample alone equals itself in a batch; contexts are worlds apart."""

import pytest
import torch

from moeca_fx import MoECa
from tests.helpers import zoo_models
from tests.helpers.transformed import SOME, run, zoo_pair
from tests.helpers.zoo_models import FAMILIES, Family, prediction, relative_error

EVERY_STEP_FULL = MoECa(interval=1)
TOLERANCE = 1e-5
FULL_RUNS = [*((family, EVERY_STEP_FULL) for family in FAMILIES), ("dsmoe", None), ("ditmoe-packed", None)]


@pytest.mark.parametrize(("family", "policy"), FULL_RUNS)
def test_full_steps_equal_the_original(family: Family, policy: MoECa | None) -> None:
    model, fast = zoo_pair(family, policy)
    with torch.no_grad():
        for batch in (1, 2, 5):
            for index, inputs in enumerate(zoo_models.trajectory(batch, steps=3, seed=batch)):
                found, expected = fast(*inputs), model(*inputs)
                assert type(found) is type(expected)
                if isinstance(expected, tuple):
                    assert found[1:] == expected[1:]
                error = relative_error(prediction(found), prediction(expected))
                assert error <= TOLERANCE, f"batch {batch}, step {index}"
    stats = fast.stats()
    assert (stats.full_steps, stats.cached_steps) == (9, 0)
    assert stats.flops_executed == stats.flops_uncached > 0


@pytest.mark.parametrize(("family", "policy"), FULL_RUNS)
def test_guided_full_steps_equal_the_original(family: Family, policy: MoECa | None) -> None:
    model, fast = zoo_pair(family, policy)
    with torch.no_grad():
        for x, t, y in zoo_models.trajectory(4, steps=2):
            found, expected = (m.forward_with_cfg(x, t, y, 3.0) for m in (fast, model))
            assert relative_error(found, expected) <= TOLERANCE


def test_guidance_runs_cached_too() -> None:
    model, fast = zoo_pair("dsmoe", MoECa(tau0=0.0))  # everything is recomputed, so results stay those of the original
    with torch.no_grad():
        for x, t, y in zoo_models.trajectory(4, steps=3, drift=0.01):
            found, expected = (m.forward_with_cfg(x, t, y, 3.0) for m in (fast, model))
            assert relative_error(found, expected) <= 0.02  # the first block is dense: its caches are reused
    assert fast.stats().cached_steps == 2


def test_no_policy_keeps_no_cache() -> None:
    _, fast = zoo_pair("dsmoe", None)
    run(fast, list(zoo_models.trajectory(steps=2)))
    assert fast.cache() == {} and fast.memory().total == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_full_step_of_a_cached_run_equals_the_original(family: Family) -> None:
    model, fast = zoo_pair(family)
    steps = list(zoo_models.trajectory(3, steps=6))
    found, expected = run(fast, steps), run(model, steps)
    for index in (0, 4):
        assert relative_error(found[index], expected[index]) <= TOLERANCE
    for index in (1, 2, 3, 5):  # different inputs: what was reused shows
        assert relative_error(found[index], expected[index]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_alone_equals_itself_in_a_batch(family: Family) -> None:
    _, fast = zoo_pair(family)
    steps = list(zoo_models.trajectory(3, steps=6))
    together = run(fast, steps)
    reused = fast.stats()
    assert 0 < reused.recomputed_branches < reused.branches
    for sample in range(3):
        fast.reset()
        one_sample = slice(sample, sample + 1)
        alone = run(fast, [(x[one_sample], t[one_sample], y[one_sample]) for x, t, y in steps])
        for index, (one, batch) in enumerate(zip(alone, together, strict=True)):
            assert relative_error(one, batch[one_sample]) <= TOLERANCE, f"sample {sample}, step {index}"


@pytest.mark.parametrize("family", ["dsmoe", "ditmoe"])
def test_two_contexts_interleaved_equal_two_runs(family: Family) -> None:
    _, fast = zoo_pair(family)
    runs = [list(zoo_models.trajectory(2, steps=6, seed=seed)) for seed in (1, 2)]
    apart = []
    for steps in runs:
        fast.reset()
        apart.append(run(fast, steps))
    caches = fast.cache()
    fast.reset()
    interleaved: list[list[torch.Tensor]] = [[], []]
    for pair in zip(*runs, strict=True):
        for name, inputs, results in zip(("cond", "uncond"), pair, interleaved, strict=True):
            with fast.context(name):
                results += run(fast, [inputs])
    for found, expected in zip(interleaved, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert fast.cache() == {}, "nothing ran in the default context"
    for name, value in fast.cache("uncond").items():
        assert torch.equal(value, caches[name])


def test_contexts_of_different_batches_and_lengths() -> None:
    _, fast = zoo_pair("dsmoe")
    long, short = (list(zoo_models.trajectory(b, steps=n, seed=b)) for b, n in ((3, 6), (2, 3)))
    expected = run(fast, long)
    fast.reset()
    found = []
    for index, inputs in enumerate(long):
        found += run(fast, [inputs])
        if index % 2:
            with fast.context("other"):
                run(fast, [short[index // 2]])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_same_run_twice_is_the_same_bit_for_bit() -> None:
    _, fast = zoo_pair("dsmoe", SOME)
    steps = list(zoo_models.trajectory(2, steps=6))
    first = run(fast, steps)
    second = run(fast, steps)  # the timestep jumps back: a new trajectory
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert fast.stats().trajectories == 2
