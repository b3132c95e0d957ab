"""The output forecast against its reference."""

import pytest

from moeca_fx.policies import build
from tests.helpers.zoo_models import Family
from tests.policies.peers.cases import trajectory
from tests.policies.peers.compare import compare
from tests.reference.peers import Forecast


@pytest.mark.parametrize(
    ("family", "order", "warmup"),
    [("dsmoe", 0, 1), ("dsmoe", 1, 2), ("ditmoe", 2, 2), ("dsmoe", 3, 3)],
)
def test_forecast(family: Family, order: int, warmup: int) -> None:
    method = build("forecast", order=order, interval=3, warmup=warmup)
    steps = list(trajectory(steps=12, drift=0.05))
    reference = compare(family, method, lambda model: Forecast(model, order, 3, warmup), steps)
    assert reference.kinds.count("full") == 3 + warmup
