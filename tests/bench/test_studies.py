"""The ablations of MoECa's score."""

import pytest

from moeca_fx.bench import studies
from moeca_fx.bench.run import Bench
from moeca_fx.bench.store import Store
from moeca_fx.bench.studies import COMBINATIONS, DECISIVE_TAU0, TERMS, score_fields, score_study


def score(fields, weight, drift, contribution):
    """Eq. 9, relative to the threshold: above 1 recomputes."""
    return (weight + fields["lambda1"] * drift + fields["lambda2"] * contribution) / fields["tau0"]


@pytest.mark.parametrize("terms", COMBINATIONS)
def test_a_term_that_is_left_out_has_no_influence_and_the_others_keep_theirs(terms):
    fields = score_fields(terms, tau0=0.4)
    parts = {"w": 0.3, "Δ": 1.1 * 0.05, "o": 0.6 * 0.2}
    expected = sum(parts[term] for term in terms) / 0.4
    assert score(fields, 0.3, 0.05, 0.2) == pytest.approx(expected, abs=2e-6)


def test_the_full_score_is_as_published():
    assert score_fields(TERMS, 0.8) == {"tau0": 0.8, "lambda1": 1.1, "lambda2": 0.6}


@pytest.mark.slow
def test_combinations_are_compared_at_the_same_work_too(subject, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "COMBINATIONS", (("w",), TERMS))
    monkeypatch.setattr(studies, "BISECTIONS", 10)
    results = score_study(Bench(subject, settings, Store(tmp_path / "r.jsonl")))
    assert [(r.terms, r.same_work) for r in results] == [("w", False), ("w+Δ+o", False)] * 2 + [
        ("w", True),
        ("w+Δ+o", True),
    ]
    one, full = (result.row.quality.reuse_ratio for result in results[-2:])
    at_one_threshold = [result.row.quality.reuse_ratio for result in results[2:4]]
    assert abs(one - full) <= 0.05
    assert abs(one - full) <= abs(at_one_threshold[0] - at_one_threshold[1])
    assert results[-2].at < DECISIVE_TAU0 == results[-1].at  # less score wants a lower threshold
