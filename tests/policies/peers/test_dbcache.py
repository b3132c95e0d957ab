"""First-block cache and DBCache against their references."""

import pytest

from moeca_fx.policies import build
from tests.helpers.zoo_models import Family
from tests.policies.peers.cases import trajectory
from tests.policies.peers.compare import compare
from tests.reference.peers import DBCache, FirstBlockCache

STEPS = 12


@pytest.mark.parametrize(
    ("family", "first", "last"),
    [("dsmoe", 1, 1), ("ditmoe", 2, 0)],
)
def test_dbcache(family: Family, first: int, last: int) -> None:
    method = build("dbcache", first=first, last=last, threshold=0.25)
    for seed in (0, 1):
        steps = list(trajectory(steps=STEPS, seed=seed))
        reference = compare(family, method, lambda model: DBCache(model, first, last, 0.25), steps, depth=3)
        assert 2 < reference.kinds.count("dbcache") < STEPS - 2


def test_first_block_cache() -> None:
    """DBCache's defaults but for the threshold, which these random models never come below."""
    method = build("dbcache", threshold=0.25)
    steps = list(trajectory(steps=STEPS))
    reference = compare("ditmoe", method, lambda model: FirstBlockCache(model, 0.25), steps)
    assert 2 < reference.kinds.count("firstblockcache") < STEPS - 2
