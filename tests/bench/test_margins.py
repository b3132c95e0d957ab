"""Who is ahead, on numbers worked out by hand."""

import math

import pytest

from moeca_fx.bench.entries import Entry
from moeca_fx.bench.frontier import frontier
from moeca_fx.bench.margins import margins
from moeca_fx.bench.quality import Quality
from moeca_fx.bench.run import Row


def row(family, group, speedup, psnr, fid=None, label="", median=None):
    quality = Quality(
        1, speedup, 1, 0, psnr, psnr if median is None else median, psnr, 1.0, None, fid, None, None, None, 0
    )
    return Row(Entry(family, "policy", group, {}, label), quality)


ROWS = [
    row("original", "baseline", 1.0, None),
    row("a", "peer", 2.0, 40.0, fid=3.0, label="1"),
    row("a", "peer", 8.0, 20.0, label="2"),
    row("a", "peer", 1.5, 39.0, label="3"),  # beaten by a 1 in both
    row("b", "peer", 2.9, 45.0, label="1"),
    row("moeca", "paper", 3.0, 30.0, fid=4.0),
    row("ours", "ours", 4.0, 42.0, fid=3.5),
    Row(Entry("c", "policy", "peer"), refused="does not fit"),
]


def test_the_best_of_those_that_reach_the_target_are_compared():
    two, three, eight = margins(ROWS, (2.0, 3.0, 8.0))
    assert (two.ours, two.peer, two.margin) == ("ours", "b 1", -3.0)
    assert (three.peer, three.margin, three.fid_change) == ("moeca", 12.0, -0.5)
    assert (eight.ours, eight.margin, eight.peer) == (None, None, "a 2")


def test_between_the_settings_of_a_peer_its_psnr_is_read_off_a_line_over_log_speed_up():
    (three,) = margins(ROWS, (3.0,))
    a_at_4 = 40 - 20 * math.log(4 / 2) / math.log(8 / 2)  # b and moeca have no settings around 4x
    assert three.margin_between == pytest.approx(42 - a_at_4)


def test_medians_are_compared_between_the_runs_that_are_best_by_them():
    rows = [
        row("a", "peer", 3.0, 30.0, median=50.0),
        row("b", "peer", 3.0, 40.0, median=41.0),
        row("ours", "ours", 3.0, 38.0, median=38.0),
        row("ours", "ours", 3.1, 35.0, median=53.0, label="2"),
    ]
    (three,) = margins(rows, (3.0,))
    assert (three.margin, three.margin_median) == (-2.0, 3.0)


def test_a_speed_up_just_below_the_target_counts():
    (margin,) = margins([row("ours", "ours", 2.99, 40.0), row("a", "peer", 2.98, 50.0)], (3.0,))
    assert (margin.ours, margin.peer) == ("ours", None)


def test_the_frontier_keeps_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 3), (3, 4.5), (4, 1), (4, 1)]
    assert frontier(points, lambda p: p[0], lambda p: p[1]) == [(1, 5), (3, 4.5), (4, 1)]
