"""Both samplers on flows whose answer is known: Gaussian data with the exact velocity, a constant denoiser."""

import math

import pytest
import torch

from moeca_fx.errors import ConfigError
from moeca_fx.zoo.sampling import SAMPLERS, noise_and_labels, sample

MEAN, SPREAD = 1.5, 0.6


def gaussian_velocity(x, t, y):
    """E[data - noise | x_t] for data N(MEAN, SPREAD^2) and x_t = (1 - t) noise + t data."""
    t = t.view(-1, 1, 1, 1)
    variance = t**2 * SPREAD**2 + (1 - t) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


def towards(data):
    """The velocity of a denoiser that always predicts `data`."""
    return lambda x, t, y: (data - x) / (1 - t.view(-1, 1, 1, 1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_exact_velocity_of_gaussian_data_gives_its_mean_and_variance(sampler):
    noise, labels = noise_and_labels(2000, seed=1)  # 128,000 values
    images = sample(gaussian_velocity, noise, labels, steps=400, sampler=sampler)
    assert images.mean() == pytest.approx(MEAN, abs=0.01)
    assert images.std() == pytest.approx(SPREAD, rel=0.01)


def test_euler_on_gaussian_data_has_a_closed_form():
    """Every Euler step is an affine map of x; the maps are multiplied out here in plain Python."""
    slope, shift, n = 1.0, 0.0, 7
    for i in range(n):
        t = i / n
        gain = (t * SPREAD**2 - (1 - t)) / (t**2 * SPREAD**2 + (1 - t) ** 2)
        slope, shift = slope * (1 + gain / n), shift * (1 + gain / n) + (MEAN - gain * t * MEAN) / n
    noise, labels = noise_and_labels(2, seed=0)
    torch.testing.assert_close(sample(gaussian_velocity, noise, labels, steps=n), slope * noise + shift)


def test_one_ancestral_step_by_hand():
    """From t = 1/2 to s = 3/4: SNR 1 and 9, so of the noise of level 1/4 one third stays and sqrt(8)/3 is fresh."""
    x, velocity, fresh = (torch.tensor(value) for value in (0.3, 0.8, -1.1))
    data, noise = 0.3 + 0.5 * 0.8, 0.3 - 0.5 * 0.8
    expected = 0.75 * data + 0.25 * (noise / 3 + math.sqrt(8) / 3 * -1.1)
    assert float(SAMPLERS["ancestral"].advance(x, velocity, fresh, 2, 4)) == pytest.approx(expected)


def test_the_first_ancestral_step_replaces_all_noise_and_each_keeps_the_level():
    """With the true data predicted, the state at s is s * data plus noise of level 1 - s, at every step."""
    data, n = torch.zeros(4000, 1, 1, 1), 5
    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    advance, generator = SAMPLERS["ancestral"].advance, torch.Generator().manual_seed(1)
    for i in range(n - 1):
        fresh = torch.randn(x.shape, generator=generator)
        x = advance(x, (data - x) / (1 - i / n), fresh, i, n)
        if i == 0:
            torch.testing.assert_close(x, (1 - 1 / n) * fresh)
        assert x.std() == pytest.approx(1 - (i + 1) / n, rel=0.04)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_constant_denoiser_is_reached_exactly_because_the_last_step_adds_no_noise(sampler, steps):
    noise, labels = noise_and_labels(3, seed=0)
    data = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(3, -1, -1, -1)
    torch.testing.assert_close(sample(towards(data), noise, labels, steps, sampler=sampler), data, atol=1e-5, rtol=0)


def test_fresh_noise_is_seeded_and_does_not_depend_on_the_model():
    noise, labels = noise_and_labels(3, seed=0)

    def run(seed, velocity):
        """The fresh noise of the first of two steps: with data 0 the state after it is noise / 2."""
        states = []
        sample(lambda x, t, y: states.append(x) or velocity(x, t), noise, labels, 2, sampler="ancestral", seed=seed)
        return states[1]

    to_zero, to_one = (lambda x, t: -x), (lambda x, t: 1 - x)
    assert torch.equal(run(4, to_zero), run(4, to_zero))
    torch.testing.assert_close(run(4, to_zero) + 0.5, run(4, to_one))
    assert not torch.equal(run(4, to_zero), run(5, to_zero))
    torch.manual_seed(8)
    before = torch.rand(1)
    torch.manual_seed(8)
    run(4, to_zero)
    assert torch.equal(torch.rand(1), before)  # the global generator was left alone


def test_fresh_noise_is_not_the_starting_noise_of_the_same_seed():
    noise, labels = noise_and_labels(500, seed=0)
    states = []
    sample(lambda x, t, y: states.append(x) or -x, noise, labels, 3, sampler="ancestral", seed=0)
    correlation = torch.corrcoef(torch.stack([noise.flatten(), states[1].flatten()]))[0, 1]
    assert abs(correlation) < 0.02


def test_euler_ignores_the_seed():
    noise, labels = noise_and_labels(2, seed=0)
    one, two = (sample(gaussian_velocity, noise, labels, 5, seed=seed) for seed in (0, 1))
    assert torch.equal(one, two)


def test_samplers_are_listed_and_strangers_refused():
    assert list(SAMPLERS) == ["euler", "ancestral"]
    assert [each.stochastic for each in SAMPLERS.values()] == [False, True]
    noise, labels = noise_and_labels(1, seed=0)
    with pytest.raises(ConfigError, match="no sampler is called 'heun'; samplers: euler, ancestral"):
        sample(gaussian_velocity, noise, labels, 5, sampler="heun")
