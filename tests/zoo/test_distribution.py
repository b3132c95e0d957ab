"""Fréchet distance and Inception-style score against values worked out by hand."""

import math
import sys

import pytest
import torch

from moeca_fx.distribution import frechet_distance, inception_score
from moeca_fx.errors import InputError, MissingExtraError
from moeca_fx.zoo.judge import load_judge
from moeca_fx.zoo.training.task import find_task


def standard(samples, width, seed=0):
    """Features whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    x = torch.randn(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(dim=0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T


def gaussian(mean, covariance, samples=200, seed=0):
    factor = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64))
    return standard(samples, len(mean), seed) @ factor.T + torch.tensor(mean, dtype=torch.float64)


def test_axis_aligned_gaussians():
    """|m|^2 = 9 + 16; deviations 1 and 3 against 2 and 1 add (1 - 2)^2 + (3 - 1)^2."""
    one = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 9.0]])
    two = gaussian([3.0, -4.0], [[4.0, 0.0], [0.0, 1.0]], samples=300, seed=1)
    assert frechet_distance(one, two) == pytest.approx(25 + 1 + 4)
    assert frechet_distance(two, one) == pytest.approx(30)


def test_covariances_that_do_not_commute():
    """In two dimensions tr((C C')^(1/2)) = sqrt(tr(C C') + 2 sqrt(det C det C'))."""
    a, b = [[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 5.0]]
    product_trace, determinants = 2 * 1 + 2 * 5, 3 * 5
    expected = 4 + 6 - 2 * math.sqrt(product_trace + 2 * math.sqrt(determinants))
    assert frechet_distance(gaussian([1.0, 1.0], a), gaussian([1.0, 1.0], b, seed=1)) == pytest.approx(expected)


def test_a_set_has_no_distance_from_itself_and_a_shift_counts_squared():
    x = standard(150, 64)
    assert 0 <= frechet_distance(x, x) < 1e-9
    assert frechet_distance(x + 0.5, x) == pytest.approx(64 * 0.25)
    assert frechet_distance(x.float() + 0.5, x.float()) == pytest.approx(16, rel=1e-5)


def test_features_without_spread():
    """A point has covariance 0: against itself 0, against another point |m|^2, against a Gaussian + tr C."""
    zero, two, spread = torch.zeros(10, 3), torch.full((10, 3), 2.0), standard(10, 3)
    assert frechet_distance(zero, zero) == 0
    assert frechet_distance(two, zero) == pytest.approx(12)
    assert frechet_distance(zero, 2 * spread) == pytest.approx(4 * 3)


def test_real_images_are_nearer_to_real_images_than_spoilt_ones():
    (images, _), (held, _) = find_task("digits").load_split()
    judge = load_judge("digits")
    reference = judge.features(images)
    distances = [frechet_distance(judge.features(each), reference) for each in (held, 0.8 * held, held.flip(2))]
    assert distances == sorted(distances)
    assert distances[2] > 5 * distances[0]


def test_the_score_of_certain_classes_is_their_number():
    assert inception_score(torch.eye(7).repeat(3, 1)) == pytest.approx(7)
    assert inception_score(torch.eye(7)[:4]) == pytest.approx(4)
    assert inception_score(torch.eye(7)[:1].repeat(5, 1)) == pytest.approx(1)


def test_the_score_of_images_that_look_alike_is_one():
    assert inception_score(torch.tensor([[0.2, 0.5, 0.3]]).repeat(9, 1)) == pytest.approx(1)


def test_the_score_by_hand():
    """Marginal (3/4, 1/4): divergences ln(4/3) and (ln(2/3) + ln 2) / 2."""
    expected = math.exp((math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2)
    assert inception_score(torch.tensor([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(expected)


def test_too_few_samples_are_refused_on_either_side():
    enough, few = torch.randn(65, 64), torch.randn(64, 64)
    assert frechet_distance(enough, enough) >= 0
    with pytest.raises(InputError, match=r"features has 64 samples of 64 dimensions; .* at least 65 samples"):
        frechet_distance(few, enough)
    with pytest.raises(InputError, match="reference has 64 samples"):
        frechet_distance(enough, few)


def test_other_bad_features_are_refused():
    good = torch.randn(9, 3)
    with pytest.raises(InputError, match=r"expected features of shape \[samples, width\], found \[9, 3, 1\]"):
        frechet_distance(good.unsqueeze(2), good)
    with pytest.raises(InputError, match=r"found \[0, 3\]"):
        frechet_distance(good, good[:0])
    with pytest.raises(InputError, match="3 wide but reference is 2 wide"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(InputError, match="reference holds values that are not finite"):
        frechet_distance(good, good / torch.tensor([1.0, 0.0, 1.0]))


def test_what_is_no_probability_is_refused():
    with pytest.raises(InputError, match=r"sum off by 0\.5; pass softmax outputs"):
        inception_score(torch.tensor([[0.5, 0.5], [0.5, 1.0]]))
    with pytest.raises(InputError, match=r"smallest value of -0\.5"):
        inception_score(torch.tensor([[1.5, -0.5]]))
    with pytest.raises(InputError, match="not finite"):
        inception_score(torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(InputError, match=r"found \[2\]"):
        inception_score(torch.tensor([0.5, 0.5]))


def test_a_missing_torchmetrics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingExtraError, match=r"torchmetrics.*moeca_fx\[demo\]"):
        frechet_distance(torch.randn(4, 2), torch.randn(4, 2))
