"""Solvers from diffusers on flows whose exact answer is known."""

from itertools import pairwise

import pytest
import torch

from moeca_fx.errors import ConfigError, InputError
from moeca_fx.zoo.sampling import noise_and_labels, sample
from moeca_fx.zoo.solvers import SOLVERS, sample_with_solver

pytest.importorskip("diffusers", reason="the package diffusers is not installed (extra: peers)")

MEAN, SPREAD = 1.5, 0.6


def gaussian_velocity(x, t, y):
    """E[data - noise | x_t] for data N(MEAN, SPREAD^2) and x_t = (1 - t) noise + t data."""
    t = t.view(-1, 1, 1, 1)
    variance = t**2 * SPREAD**2 + (1 - t) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


def error(steps, **options):
    """Largest distance to the exact flow, which takes noise z to MEAN + SPREAD z; in double precision."""
    noise, labels = noise_and_labels(4, seed=1)
    noise = noise.double()
    found = sample_with_solver(gaussian_velocity, noise, labels, steps, **options)
    return float((found - (MEAN + SPREAD * noise)).abs().max())


def test_euler_is_our_euler():
    noise, labels = noise_and_labels(3, seed=0)
    for steps in (1, 7, 250):
        ours = sample(gaussian_velocity, noise, labels, steps)
        theirs = sample_with_solver(gaussian_velocity, noise, labels, steps, solver="euler", order=1)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_sde_dpmsolver_of_order_1_is_our_ancestral_sampler():
    noise, labels = noise_and_labels(3, seed=0)
    for steps in (2, 9, 60):
        ours = sample(gaussian_velocity, noise, labels, steps, sampler="ancestral", seed=5)
        options = {"solver": "sde-dpmsolver++", "order": 1, "seed": 5}
        theirs = sample_with_solver(gaussian_velocity, noise, labels, steps, **options)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("solver", "order"), [(s, o) for s in ("dpmsolver++", "unipc") for o in (2, 3)])
def test_higher_orders_converge_faster_than_euler(solver, order):
    def gain(**options):
        return error(20, **options) / error(160, **options)

    assert 6 < gain(solver="euler", order=1) < 9  # first order: an eighth of the step, an eighth of the error
    assert gain(solver=solver, order=order) > 14
    assert error(160, solver=solver, order=order) < error(160, solver="euler", order=1) / 20


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_model_is_asked_on_the_grid_and_an_own_grid_is_taken(solver):
    noise, labels = noise_and_labels(1, seed=0)
    asked, done = [], []

    def watched(x, t, y):
        asked.append(float(t))
        return gaussian_velocity(x, t, y), "the rest of a model's tuple"

    sample_with_solver(watched, noise, labels, 4, lambda *at: done.append(at), solver=solver, order=1)
    assert asked == [0.0, 0.25, 0.5, 0.75]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    asked.clear()
    sample_with_solver(watched, noise, labels, 3, solver=solver, order=1, times=(0, 0.125, 0.75))
    assert asked == [0.0, 0.125, 0.75]


def test_one_first_order_step_on_an_own_grid_by_hand():
    """DPM-Solver++ of order 1 and Euler are the same step, x + (s - t) v, on any grid."""
    noise, labels = noise_and_labels(2, seed=4)
    x = noise
    times = [0.0, 0.2, 0.7, 1.0]
    for t, s in pairwise(times):
        x = x + (s - t) * gaussian_velocity(x, torch.full((2,), t), labels)
    for solver in ("euler", "dpmsolver++"):
        found = sample_with_solver(gaussian_velocity, noise, labels, 3, solver=solver, order=1, times=times[:-1])
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused():
    noise, labels = noise_and_labels(2, seed=0)

    def attempt(steps=4, **options):
        sample_with_solver(gaussian_velocity, noise, labels, steps, **options)

    with pytest.raises(ConfigError, match="no solver is called 'heun'; solvers: euler"):
        attempt(solver="heun")
    with pytest.raises(ConfigError, match=r"unipc: expected an order of 1, 2, 3, found 4"):
        attempt(solver="unipc", order=4)
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        attempt(steps=0)
    for times in ((0.1, 0.5), (0, 0.5, 0.4), (0, 1.0)):
        with pytest.raises(InputError, match="times that rise from 0 and stay below 1"):
            attempt(steps=len(times), times=times)
    with pytest.raises(InputError, match="expected fresh noise for 4 steps"):
        attempt(solver="sde-dpmsolver++", order=1, fresh=[noise])
    with pytest.raises(InputError, match="noise has batch 2 but labels have 1"):
        sample_with_solver(gaussian_velocity, noise, labels[:1], 4)
