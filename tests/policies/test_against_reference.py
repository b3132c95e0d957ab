"""Cached steps equal the slow reference: outputs and every cached tensor, for every config choice."""

from typing import Any, get_args

import pytest

from moeca_fx import MoECa
from moeca_fx.policies.branch import EntropyNorm, ScoreWeight
from moeca_fx.policies.rules import AttentionMode, RowMode
from tests.helpers.grids import slow
from tests.policies.comparison import run_both
from tests.reference.cases import FAMILIES, Family

SOME = 0.6  # tau0 under which part of the branches is recomputed


def _choices() -> list[MoECa]:
    """Nine configs in which each pair of (attention, dense_ffn, shared_expert) values meets once.

    The two-valued fields and the interval alternate so that each of their values meets each attention mode.
    """
    configs = []
    for a, attention in enumerate(get_args(AttentionMode)):
        for d, dense_ffn in enumerate(get_args(RowMode)):
            config = MoECa(
                interval=(4, 2)[(a + d) % 2],
                tau0=SOME,
                score_weight=get_args(ScoreWeight)[d % 2],
                entropy_norm=get_args(EntropyNorm)[(a + d // 2) % 2],
                attention=attention,
                dense_ffn=dense_ffn,
                shared_expert=get_args(RowMode)[(a + d) % 3],
            )
            configs.append(config)
    return configs


def _name(policy: MoECa) -> str:
    rows = f"{policy.attention}-{policy.dense_ffn}-{policy.shared_expert}"
    return f"{rows}-{policy.score_weight}-{policy.entropy_norm}-{policy.interval}"


def _spread() -> list[Any]:
    """Every config with every family; in the fast ones, each pair of values and each value with a family meets once."""
    cells = []
    for index, policy in enumerate(_choices()):
        fast = FAMILIES[(index // 3 - index) % len(FAMILIES)]
        cells += [
            (pytest.param if family == fast else slow)(policy, family, id=f"{_name(policy)}-{family}")
            for family in FAMILIES
        ]
    return cells


ONE_FAMILY = [FAMILIES[0], *map(slow, FAMILIES[1:])]


@pytest.mark.parametrize(("policy", "family"), _spread())
def test_partly_recomputed(policy: MoECa, family: Family) -> None:
    totals = run_both(family, policy)
    branches, recomputed = (sum(getattr(c, name) for c in totals) for name in ("branches", "recomputed"))
    assert 0 < recomputed < branches
    assert sum(c.matched for c in totals) < branches  # some branches lost their expert


@pytest.mark.parametrize("family", ONE_FAMILY)
def test_everything_recomputed(family: Family) -> None:
    totals = run_both(family, MoECa(tau0=0.0))
    assert sum(c.recomputed for c in totals) == sum(c.branches for c in totals) > 0


@pytest.mark.parametrize("family", ONE_FAMILY)
def test_nothing_recomputed(family: Family) -> None:
    totals = run_both(family, MoECa(tau0=50.0), drift=1e-4, tick=1e-3)
    assert sum(c.branches for c in totals) > 0
    assert sum(c.recomputed + c.attention_rows + c.ffn_rows + c.shared_rows for c in totals) == 0


@pytest.mark.parametrize("family", ONE_FAMILY)
@pytest.mark.parametrize("seed", [4, slow(5)])
def test_other_weights_and_inputs(family: Family, seed: int) -> None:
    totals = run_both(family, MoECa(tau0=SOME), batch=3, seed=seed)
    assert 0 < sum(c.recomputed for c in totals) < sum(c.branches for c in totals)
