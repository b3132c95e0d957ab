"""The paper's ablations of MoECa on any model: hyperparameters (Fig. 7), score (Table 4), lambda grid (Table 5).

At the published tau0 = 0.8 a small model's scores rarely reach the threshold, and then no other number matters. Every
study therefore runs twice: as published, and at a lower tau0 at which the score decides something.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from moeca_fx.bench.entries import Entry
from moeca_fx.bench.quality import Quality
from moeca_fx.bench.run import Bench, Row
from moeca_fx.bench.suite import label

PUBLISHED_TAU0, DECISIVE_TAU0 = 0.8, 0.4
TAU0S = (PUBLISHED_TAU0, DECISIVE_TAU0)
LAMBDA1, LAMBDA2 = 1.1, 0.6

HYPERPARAMETERS: dict[str, tuple[float, ...]] = {
    "interval": (2, 3, 4, 5, 6, 8),
    "tau0": (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0),
    "alpha": (0.0, 0.2, 0.4, 0.6, 0.8),
    "beta": (0.25, 0.45, 0.65, 0.85),
    "lambda1": (0.0, 0.5, 1.1, 1.5, 3.0),
    "lambda2": (0.0, 0.3, 0.6, 0.9, 1.5),
}
"""Values of each; the others stay as published."""

TERMS = ("w", "Δ", "o")
COMBINATIONS = (("w",), ("Δ",), ("o",), ("w", "Δ"), ("w", "o"), ("Δ", "o"), TERMS)
LAMBDA1S = (0.5, 0.7, 0.9, 1.1, 1.3, 1.5)
LAMBDA2S = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)

WITHOUT_WEIGHT = 1e6
"""Factor on the other terms and on the threshold that leaves the routing weight, at most 1, without influence."""

BISECTIONS = 9
MATCHING_SAMPLES = 8


def hyperparameter_entries() -> list[Entry]:
    """One run for each value of each hyperparameter, at both thresholds."""
    entries = []
    for name, values in HYPERPARAMETERS.items():
        for tau0 in (None,) if name == "tau0" else TAU0S:
            base = {} if tau0 is None else {"tau0": tau0}
            entries += [_entry({**base, name: value}) for value in values]
    return entries


def lambda_entries(tau0: float) -> list[Entry]:
    """The grid of the two weights of the score, rows of `LAMBDA1S` after each other."""
    return [_entry({"tau0": tau0, "lambda1": one, "lambda2": two}) for one in LAMBDA1S for two in LAMBDA2S]


def score_fields(terms: Iterable[str], tau0: float) -> dict[str, Any]:
    """Fields of a score made of some of its terms: w (routing weight), Δ (its drift), o (the cached contribution)."""
    chosen = set(terms)
    factor = 1.0 if "w" in chosen else WITHOUT_WEIGHT
    return {
        "tau0": tau0 * factor,
        "lambda1": LAMBDA1 * factor if "Δ" in chosen else 0.0,
        "lambda2": LAMBDA2 * factor if "o" in chosen else 0.0,
    }


@dataclass(frozen=True)
class ScoreResult:
    """One combination of terms.

    Attributes:
        terms: joined by ``+``.
        at: tau0 at which it was compared, or the one that gives it the work of the full score.
        same_work: whether `at` was found so.
    """

    terms: str
    at: float
    same_work: bool
    row: Row


def score_study(bench: Bench) -> list[ScoreResult]:
    """Each combination at both thresholds, and where it recomputes as much as the full score at the lower one.

    Comparing scores at one threshold compares mostly how much they recompute; at the same work, what they choose.
    """
    results = []
    for tau0 in TAU0S:
        for terms in COMBINATIONS:
            results.append(_score_result(bench, terms, tau0, same_work=False))
    small = Bench(bench.subject, replace(bench.settings, samples=MATCHING_SAMPLES, batch=MATCHING_SAMPLES), bench.store)
    target = _reuse(small, TERMS, DECISIVE_TAU0)
    for terms in COMBINATIONS:
        tau0 = DECISIVE_TAU0 if terms == TERMS else _matching_tau0(small, terms, target)
        results.append(_score_result(bench, terms, tau0, same_work=True))
    return results


def rows_of(bench: Bench, entries: Iterable[Entry]) -> list[Row]:
    """Quality of these runs."""
    return [Row(entry, bench.quality(entry)) for entry in entries]


def _score_result(bench: Bench, terms: tuple[str, ...], tau0: float, same_work: bool) -> ScoreResult:
    entry = Entry("moeca", "policy", "paper", score_fields(terms, tau0), f"{'+'.join(terms)} tau0={tau0:.3g}")
    return ScoreResult("+".join(terms), tau0, same_work, Row(entry, bench.quality(entry)))


def _matching_tau0(bench: Bench, terms: tuple[str, ...], target: float) -> float:
    """tau0 at which these terms reuse the share `target`; bisection over its logarithm. More tau0 is more reuse."""
    low, high = 1e-4, 4.0
    for _ in range(BISECTIONS):
        middle = float(f"{(low * high) ** 0.5:.4g}")
        if _reuse(bench, terms, middle) < target:
            low = middle
        else:
            high = middle
    return high


def _reuse(bench: Bench, terms: tuple[str, ...], tau0: float) -> float:
    quality: Quality = bench.quality(_entry(score_fields(terms, tau0)))
    return quality.reuse_ratio or 0.0


def _entry(fields: dict[str, Any]) -> Entry:
    return Entry("moeca", "policy", "paper", fields, label(fields))
