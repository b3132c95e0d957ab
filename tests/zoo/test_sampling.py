"""The sampling loop against closed forms, its starting points, and the classifier that judges digits."""

import sys
from dataclasses import replace

import pytest
import torch

import moeca_fx
from moeca_fx.errors import InputError, MissingExtraError
from moeca_fx.zoo import DSMoE, randomize_
from moeca_fx.zoo.digits import classifier, data
from moeca_fx.zoo.glyphs.config import GLYPHS
from moeca_fx.zoo.sampling import guided, noise_and_labels, sample
from tests.helpers.zoo_models import TINY_PIXELS


def test_euler_on_a_linear_velocity_has_its_closed_form():
    """dx/dt = x in n Euler steps grows by (1 + 1/n)^n."""
    noise, labels = noise_and_labels(3, seed=0)
    result = sample(lambda x, t, y: x, noise, labels, steps=10)
    torch.testing.assert_close(result, noise * 1.1**10)


def test_timesteps_run_from_zero_and_labels_are_passed_on():
    noise, labels = noise_and_labels(12, seed=0)
    seen = []

    def model(x, t, y):
        seen.append(t)
        assert torch.equal(y, labels)
        return torch.zeros_like(x)

    ticks = []
    sample(model, noise, labels, steps=4, progress=lambda done, steps: ticks.append((done, steps)))
    assert torch.equal(torch.stack(seen), torch.tensor([0.0, 0.25, 0.5, 0.75])[:, None].expand(4, 12))
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_tuple_outputs_and_learned_sigma_channels_are_handled():
    noise, labels = noise_and_labels(2, seed=0)
    tuple_model = lambda x, t, y: (torch.cat([torch.ones_like(x), torch.full_like(x, 9.0)], dim=1), "rest")  # noqa: E731
    torch.testing.assert_close(sample(tuple_model, noise, labels, steps=5), noise + 1)


def test_noise_is_seeded_and_labels_cycle():
    noise, labels = noise_and_labels(23, seed=4)
    assert torch.equal(noise, noise_and_labels(23, seed=4)[0])
    assert not torch.equal(noise, noise_and_labels(23, seed=5)[0])
    assert labels.tolist() == [i % 10 for i in range(23)]


def test_digits_keep_the_noise_they_always_had():
    noise, _ = noise_and_labels(3, seed=7)
    assert torch.equal(noise, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(7)))


def test_noise_and_labels_fit_the_model_and_the_classes_asked_for():
    noise, labels = noise_and_labels(5, seed=0, config=GLYPHS, classes=range(1, 62, 2))
    assert noise.shape == (5, 1, 32, 32)
    assert labels.tolist() == [1, 3, 5, 7, 9]
    assert noise_and_labels(5, seed=0, classes=(3, 8))[1].tolist() == [3, 8, 3, 8, 3]


def test_noise_is_not_changed_in_place():
    noise, labels = noise_and_labels(2, seed=0)
    before = noise.clone()
    sample(lambda x, t, y: x, noise, labels, steps=2)
    assert torch.equal(noise, before)


def test_wrong_arguments_are_refused():
    noise, labels = noise_and_labels(2, seed=0)
    with pytest.raises(InputError, match="steps must be at least 1"):
        sample(lambda x, t, y: x, noise, labels, steps=0)
    with pytest.raises(InputError, match="batch 2 but labels have 1"):
        sample(lambda x, t, y: x, noise, labels[:1])
    with pytest.raises(InputError, match="batch must be at least 1"):
        noise_and_labels(0, seed=0)
    with pytest.raises(InputError, match=r"expected classes 0 to 9, found \[10, -1\]"):
        noise_and_labels(2, seed=0, classes=(0, 10, -1))
    with pytest.raises(InputError, match="expected classes 0 to 9, found none"):
        noise_and_labels(2, seed=0, classes=())


def test_the_classifier_knows_real_digits_and_rejects_noise():
    _, (held, labels) = data.load_split()
    known = classifier.load_classifier().held_out_accuracy
    assert classifier.accuracy(held, labels) == known >= 0.97
    noise, wanted = noise_and_labels(500, seed=0)
    assert classifier.accuracy(noise, wanted) < 0.2


def test_the_classifier_clamps_and_checks_shapes():
    _, (held, labels) = data.load_split()
    overshoot = torch.where(held == 1, 3.0, held)
    assert classifier.accuracy(overshoot, labels) == classifier.accuracy(held, labels)
    with pytest.raises(InputError, match=r"expects images \[N, 1, 8, 8\], got \(2, 8, 8\)"):
        classifier.accuracy(torch.zeros(2, 8, 8), labels[:2])


def test_a_missing_scikit_learn_is_named(monkeypatch):
    data._all_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"sklearn.*moeca_fx\[demo\]"):
        data.load_split()


def test_guidance_by_hand():
    def model(x, t, y):
        return torch.cat([x * y.view(-1, 1, 1, 1).float(), x], dim=1), "the rest"  # velocity x * y, learned sigma x

    x, t, y = torch.randn(3, 2, 4, 4), torch.zeros(3), torch.tensor([1, 2, 3])
    wanted = x * y.view(-1, 1, 1, 1)
    assert torch.equal(guided(model, 1.0, 10)(x, t, y), wanted)
    torch.testing.assert_close(guided(model, 0.0, 10)(x, t, y), x * 10)
    torch.testing.assert_close(guided(model, 3.0, 10)(x, t, y), x * 10 + 3 * (wanted - x * 10))


def test_a_guided_model_may_be_transformed():
    model = randomize_(DSMoE(replace(TINY_PIXELS, class_dropout=0.1))).eval()
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    fast = moeca_fx.transform(model, (x, torch.zeros(2), y), policy=None)
    expected, found = (sample(guided(each, 2.0, 10), x, y, 4) for each in (model, fast))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
