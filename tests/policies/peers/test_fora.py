"""FORA against its reference."""

import pytest

from moeca_fx.policies import build
from tests.helpers.zoo_models import Family
from tests.policies.peers.cases import trajectory
from tests.policies.peers.compare import compare
from tests.reference.peers import FORA


@pytest.mark.parametrize("family", ["dsmoe-groups", "ditmoe"])
def test_fora(family: Family) -> None:
    method = build("fora", interval=3)
    reference = compare(family, method, lambda model: FORA(model, interval=3), list(trajectory(steps=10)))
    assert reference.kinds == (["full", "fora", "fora"] * 4)[:10]
