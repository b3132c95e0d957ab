"""When the references compute, and how many tokens, against schedules written out by hand."""

import pytest

from tests.reference.peers.schedules import is_full, steps_since_full, toca_full_steps
from tests.reference.peers.token_scores import fresh_count, fresh_ratio


def _full(steps: int, interval: int, warmup: int) -> list[int]:
    return [j for j in range(steps) if is_full(j, interval, warmup)]


def test_fixed_cycles() -> None:
    assert _full(10, 4, warmup=1) == [0, 4, 8]
    assert _full(10, 4, warmup=2) == [0, 1, 5, 9]
    assert _full(9, 3, warmup=3) == [0, 1, 2, 5, 8]
    assert _full(3, 1, warmup=1) == [0, 1, 2]


def test_toca_schedule_by_hand() -> None:
    """T_s = 8, N = 4; the sensitive range is 1 <= s < 3.

    s = 7 full: c = round(4 / (1.4 - 0.7)) = round(5.71) = 6;
    s = 6 is a multiple: c = round(4 / (1.4 - 0.6)) = 5, of which 6 is none;
    s = 5 is a multiple: c = round(4 / (1.4 - 0.5)) = round(4.44) = 4, of which 5 is none;
    s = 4 is a multiple: c = round(4 / (1.4 - 0.4)) = 4: full; 3, 2 and 1 are none; s = 0 is full.
    """
    assert [7 - j for j, full in enumerate(toca_full_steps(8, 4)) if full] == [7, 4, 0]


def test_toca_computes_more_often_in_the_sensitive_range() -> None:
    """T_s = 20, N = 4; the sensitive range is 4 <= s < 8.

    s = 19: 4 / 0.64 = 6.25 -> 6; s = 18: 4 / 0.68 = 5.88 -> 6, full; s = 12: 4 / 0.92 = 4.35 -> 4, full; s = 8:
    4 / 1.08 = 3.70 -> 4, full; s = 4: c = 2, full; s = 2: 4 / 1.32 = 3.03 -> 3, not full; s = 0.
    """
    assert [19 - j for j, full in enumerate(toca_full_steps(20, 4)) if full] == [19, 18, 12, 8, 4, 0]


def test_toca_full_steps_as_published() -> None:
    full = toca_full_steps(250, 4)
    assert len(full) == 250
    assert sum(full) == 72


def test_steps_since_full() -> None:
    full = [True, False, False, True, True, False]
    assert [steps_since_full(full, j) for j in range(6)] == [0, 1, 2, 0, 0, 1]


def test_fresh_ratio_by_hand() -> None:
    # half way: 1.4 - 0.4 = 1; first layer 1.8, last layer 0.2, the one between 1
    assert fresh_ratio(0.07, 0, 3, 50, 100) == pytest.approx(0.07 * 1.8 * 2.5)
    assert fresh_ratio(0.07, 1, 3, 50, 100) == pytest.approx(0.07 * 2.5)
    assert fresh_ratio(0.07, 2, 3, 50, 100) == pytest.approx(0.07 * 0.2 * 2.5)
    assert fresh_ratio(0.07, 0, 1, 0, 100) == pytest.approx(0.07 * 1.8 * 1.4 * 2.5)
    assert fresh_ratio(1.0, 0, 3, 50, 100) == 1.0


def test_fresh_count_rounds_down() -> None:
    assert [fresh_count(ratio, 10) for ratio in (0.0, 0.09, 0.1, 0.59, 1.0)] == [0, 0, 1, 5, 10]
