"""A tiny random model as the subject of a bench."""

import pytest

from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.subject import Subject
from tests.helpers.zoo_models import tiny_dsmoe

STEPS = 6


def velocity_of(model):
    return lambda x, t, y: model(x, t, y)[0][:, : x.shape[1]]


@pytest.fixture(scope="session")
def subject():
    return Subject("tiny", tiny_dsmoe(depth=2), 10, velocity_of)


@pytest.fixture
def settings():
    return BenchSettings(steps=STEPS, batch=2, samples=4, repeats=2, seed=3)
