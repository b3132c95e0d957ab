"""TaylorSeer's finite differences on numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from tests.reference.peers.differences import Differences


def _value(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def _after(order: int, **full_steps: float) -> Differences:
    differences = Differences(order)
    for name, value in full_steps.items():
        differences.update(int(name.removeprefix("at")), _value(value))
    return differences


def test_factors_of_a_square() -> None:
    """Y = s^2 at 0, 1, 4: F1 is 1 at s = 1 and (16 - 1) / 3 = 5 at s = 4; F2 = (5 - 1) / 3."""
    differences = _after(4, at0=0.0, at1=1.0, at4=16.0)
    assert [float(f) for f in differences.factors] == pytest.approx([16.0, 5.0, 4 / 3])
    assert float(differences.predict(6)) == pytest.approx(16 + 5 * 2 + 4 / 3 * 2**2 / 2)


def test_the_order_limits_the_factors() -> None:
    steps = {"at0": 0.0, "at1": 1.0, "at4": 16.0}
    assert float(_after(0, **steps).predict(6)) == 16.0
    assert float(_after(1, **steps).predict(6)) == 26.0


def test_third_order() -> None:
    """Y = s^3 at 0, 1, 2, 3: F1 = 1, 7, 19; F2 = 6, 12; F3 = 6. At 5: 27 + 19 * 2 + 12 * 4 / 2 + 6 * 8 / 6."""
    differences = _after(3, at0=0.0, at1=1.0, at2=8.0, at3=27.0)
    assert [float(f) for f in differences.factors] == [27.0, 19.0, 12.0, 6.0]
    assert float(differences.predict(5)) == 27 + 38 + 24 + 8


def test_few_full_steps_give_few_orders() -> None:
    assert float(_after(4, at0=3.0).predict(9)) == 3.0
    assert float(_after(4, at0=3.0, at2=7.0).predict(5)) == 7 + 2 * 3


def test_positions_may_count_down() -> None:
    up, down = Differences(2), Differences(2)
    for position, value in [(0, 1.0), (1, 4.0), (5, 2.0)]:
        up.update(position, _value(value))
        down.update(99 - position, _value(value))
    assert float(up.predict(8)) == pytest.approx(float(down.predict(99 - 8)))
