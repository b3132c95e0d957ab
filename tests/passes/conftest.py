"""Graphs that several pass tests look at; tracing costs about a second, so each is made once."""

import pytest

from tests.helpers import toys, zoo_models
from tests.helpers.passes import Stage, staged


@pytest.fixture(scope="session")
def toy_stage() -> Stage:
    """Two storeys of attention and experts."""
    return staged(toys.toy(height=2), toys.toy_inputs())


@pytest.fixture(scope="session")
def dsmoe_stage() -> Stage:
    """Dense and MoE blocks in turn, four in all."""
    return staged(zoo_models.tiny_dsmoe(depth=4), zoo_models.inputs())
