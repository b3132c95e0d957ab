"""TaylorSeer against its reference, and its forecast's weights against the finite differences they stand for."""

import random

import pytest
import torch

from moeca_fx.policies import build
from moeca_fx.policies.predictor import Taylor
from tests.helpers.grids import slow
from tests.helpers.zoo_models import Family
from tests.policies.peers.cases import trajectory
from tests.policies.peers.compare import compare
from tests.reference.peers import TaylorSeer
from tests.reference.peers.differences import Differences


@pytest.mark.parametrize(
    ("family", "order", "warmup"),
    [slow("dsmoe", 0, 1), ("dsmoe", 2, 2), slow("ditmoe", 1, 2), ("ditmoe-packed", 4, 2)],
)
def test_taylorseer(family: Family, order: int, warmup: int) -> None:
    method = build("taylorseer", order=order, interval=3, warmup=warmup)
    steps = list(trajectory(steps=14, drift=0.05))
    reference = compare(family, method, lambda model: TaylorSeer(model, order, 3, warmup), steps)
    assert reference.kinds.count("taylorseer") == 14 - 4 - warmup


@pytest.mark.parametrize("order", range(5))
def test_weights_are_the_finite_differences(order: int) -> None:
    """At any spacing, also while there are fewer full steps than the order asks for."""
    draw = random.Random(order)
    for count in range(1, 8):
        places = sorted(draw.sample(range(30), count))
        step = places[-1] + draw.randint(1, 6)
        values = [draw.gauss(0, 1) for _ in places]
        differences = Differences(order)
        for place, value in zip(places, values, strict=True):
            differences.update(place, torch.tensor(value, dtype=torch.float64))
        weights = Taylor(order).weights(step, places[::-1])
        assert len(weights) == order + 1
        found = sum(w * v for w, v in zip(weights, values[::-1], strict=False))
        assert found == pytest.approx(float(differences.predict(step)), rel=1e-9, abs=1e-12)
