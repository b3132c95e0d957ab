"""TeaCache against its reference."""

import pytest

from moeca_fx.policies import build
from tests.helpers.zoo_models import Family
from tests.policies.peers.cases import trajectory
from tests.policies.peers.compare import compare
from tests.reference.peers import TeaCache

STEPS = 12
CURVED = (0.5, 1.0, 0.0, 0.01)


@pytest.mark.parametrize(
    ("family", "coefficients"),
    [("dsmoe", (1.0, 0.0)), ("ditmoe-packed", CURVED)],
)
def test_teacache(family: Family, coefficients: tuple[float, ...]) -> None:
    threshold = 0.3 if coefficients == (1.0, 0.0) else 0.08
    method = build("teacache", steps=STEPS, threshold=threshold, coefficients=coefficients)
    for seed in (0, 1):
        steps = list(trajectory(steps=STEPS, seed=seed))
        reference = compare(family, method, lambda model: TeaCache(model, STEPS, threshold, coefficients), steps)
        assert 3 < reference.kinds.count("teacache") < STEPS - 2
        assert reference.kinds[-1] == "full"
