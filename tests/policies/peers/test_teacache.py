"""TeaCache and its calibration against their references."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from moeca_fx.calibration import fit_teacache, record
from moeca_fx.policies import build
from tests.helpers.zoo_models import Family
from tests.policies.peers.cases import tiny_double, trajectory
from tests.policies.peers.compare import compare
from tests.reference.peers import TeaCache
from tests.reference.peers.teacache import fit_coefficients, measured_changes, polynomial

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


def test_calibration() -> None:
    """The fitted polynomials agree where they were fitted; their coefficients need not, they are ill-conditioned."""
    model, steps = tiny_double("dsmoe", depth=2), list(trajectory(steps=STEPS))

    def sampler(called: Callable[..., Any]) -> Tensor:
        outputs: list[Tensor] = [called(*inputs)[0] for inputs in steps]
        return outputs[-1]

    changes = measured_changes(model, steps)
    expected, found = fit_coefficients(changes), fit_teacache(model, record(sampler, model))
    assert len(found) == 5
    for change, _ in changes:
        assert polynomial(found, change) == pytest.approx(polynomial(expected, change), rel=1e-3)
