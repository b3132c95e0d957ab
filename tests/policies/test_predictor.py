"""Weights of forecasts on numbers worked out by hand, and the polynomials that each predictor must reproduce."""

import pytest

from moeca_fx.errors import ConfigError
from moeca_fx.policies.predictor import Fitted, Hold, Lagrange, Predictor, Taylor


def _forecast(predictor: Predictor, step: int, full: list[int], values: list[float]) -> float:
    weights = predictor.weights(step, full)
    assert len(weights) == predictor.terms
    return sum(w * v for w, v in zip(weights, values, strict=False))


def test_hold() -> None:
    assert Hold().weights(7, [4, 0]) == (1.0,)


def test_taylor_order_one_continues_the_last_change() -> None:
    # F0 = 5, F1 = (5 - 2) / (6 - 4) = 1.5; at step 7: 5 + 1.5
    assert _forecast(Taylor(1), 7, [6, 4], [5.0, 2.0]) == pytest.approx(6.5)


def test_taylor_order_two_as_published() -> None:
    # Full at 6, 4, 1 with Y = 5, 2, 2: F1(6) = 1.5, F1(4) = 0, F2(6) = (1.5 - 0) / 2 = .75
    # at step 8: 5 + 1.5 * 2 + .75 * 2^2 / 2 = 9.5
    assert _forecast(Taylor(2), 8, [6, 4, 1], [5.0, 2.0, 2.0]) == pytest.approx(9.5)


def test_taylor_grows_with_the_history() -> None:
    assert Taylor(3).weights(5, [4]) == (1.0, 0.0, 0.0, 0.0)
    assert Taylor(3).weights(5, [4, 2])[2:] == (0.0, 0.0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lagrange_reproduces_polynomials_at_any_spacing(order: int) -> None:
    full = [17, 12, 11, 5, 0][: order + 1]
    for power in range(order + 1):
        found = _forecast(Lagrange(order), 21, full, [float(p) ** power for p in full])
        assert found == pytest.approx(21.0**power)


def test_taylor_of_order_two_is_not_exact_for_a_parabola() -> None:
    """The published formula divides the second backward difference by 2! without centring it."""
    full = [8, 4, 0]
    assert _forecast(Taylor(2), 10, full, [float(p) ** 2 for p in full]) != pytest.approx(100.0)
    assert _forecast(Lagrange(2), 10, full, [float(p) ** 2 for p in full]) == pytest.approx(100.0)


@pytest.mark.parametrize("predictor", [Hold(), Taylor(3), Lagrange(3)])
@pytest.mark.parametrize("full", [[4], [4, 1], [9, 4, 1], [9, 8, 7, 3, 0]])
def test_constants_are_kept(predictor: Predictor, full: list[int]) -> None:
    assert sum(predictor.weights(full[0] + 3, full)) == pytest.approx(1.0)


def test_fitted_looks_its_step_up() -> None:
    fitted = Fitted(((2, (1.5, -0.5)), (3, (2.0, -1.0))))
    assert fitted.terms == 2 and fitted.weights(3, [1, 0]) == (2.0, -1.0)
    with pytest.raises(ConfigError, match="weights for step 4"):
        fitted.weights(4, [1, 0])
    with pytest.raises(ConfigError, match="of one length"):
        Fitted(((2, (1.0,)), (3, (1.0, 0.0))))
