"""One noise path for few and for many steps."""

import pytest
import torch

from moeca_fx.bench.noise_path import coarse_noise, coarse_steps
from moeca_fx.errors import InputError
from moeca_fx.zoo.sampling import noise_and_labels, sample
from moeca_fx.zoo.solvers import sample_with_solver

MEAN, SPREAD = 1.5, 0.6


def gaussian_velocity(x, t, y):
    """E[data - noise | x_t] for data N(MEAN, SPREAD^2) and x_t = (1 - t) noise + t data."""
    t = t.view(-1, 1, 1, 1)
    variance = t**2 * SPREAD**2 + (1 - t) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


def towards(data):
    """The velocity of a denoiser that always predicts `data`: no step is too long for it."""
    return lambda x, t, y: (data - x) / (1 - t.view(-1, 1, 1, 1))


def test_long_steps_begin_on_the_fine_grid():
    assert coarse_steps(4, 8) == (0, 2, 4, 6)
    assert coarse_steps(3, 8) == (0, 3, 5)
    assert coarse_steps(8, 8) == tuple(range(8))
    for wrong in (0, 9):
        with pytest.raises(InputError, match="expected 1 to 8 steps"):
            coarse_steps(wrong, 8)


def test_the_noise_of_a_long_step_is_standard_normal_and_of_short_ones_the_samplers_own():
    like = torch.zeros(20_000, 1, 1, 1)
    longs = coarse_noise(like, coarse_steps(4, 16), 16, seed=3)
    for noise in longs[:-1]:
        assert noise.std() == pytest.approx(1, abs=0.03)
        assert noise.mean() == pytest.approx(0, abs=0.03)
    assert abs(float((longs[0] * longs[1]).mean())) < 0.03  # independent
    assert torch.equal(longs[-1], like)


@pytest.mark.parametrize("steps", [2, 3, 5, 16])
def test_where_the_denoiser_is_constant_few_steps_pass_through_the_states_of_many(steps):
    pytest.importorskip("diffusers", reason="the package diffusers is not installed (extra: peers)")
    noise, labels = noise_and_labels(3, seed=1)
    data, fine, begins = torch.full_like(noise, 0.7), 16, coarse_steps(steps, 16)
    states = {"many": {}, "few": {}}

    def watched(which):
        def model(x, t, y):
            states[which][round(float(t[0]) * fine)] = x.clone()
            return towards(data)(x, t, y)

        return model

    sample(watched("many"), noise, labels, fine, sampler="ancestral", seed=9)
    options = {"solver": "sde-dpmsolver++", "order": 1, "times": [begin / fine for begin in begins]}
    fresh = coarse_noise(noise, begins, fine, seed=9)
    sample_with_solver(watched("few"), noise, labels, steps, fresh=fresh, **options)
    assert set(states["few"]) == set(begins)
    for step, state in states["few"].items():
        torch.testing.assert_close(state, states["many"][step], rtol=1e-4, atol=1e-4)


def test_more_steps_along_a_path_come_closer_to_its_end():
    pytest.importorskip("diffusers", reason="the package diffusers is not installed (extra: peers)")
    noise, labels = noise_and_labels(2, seed=1)
    fine = 480
    end = sample(gaussian_velocity, noise, labels, fine, sampler="ancestral", seed=4)

    def distance(steps):
        begins = coarse_steps(steps, fine)
        options = {"solver": "sde-dpmsolver++", "order": 1, "times": [begin / fine for begin in begins]}
        fresh = coarse_noise(noise, begins, fine, seed=4)
        return float((sample_with_solver(gaussian_velocity, noise, labels, steps, fresh=fresh, **options) - end).std())

    unrelated = float((sample(gaussian_velocity, noise, labels, 60, sampler="ancestral", seed=4) - end).std())
    assert distance(240) < distance(60) < distance(15) < unrelated / 2
