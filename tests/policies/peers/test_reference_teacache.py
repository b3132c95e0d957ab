"""TeaCache on a model whose modulated input and residual are the timestep itself."""

import pytest

from tests.policies.peers.hand_model import HandBlock, HandModel, constant, inputs
from tests.reference.peers import TeaCache
from tests.reference.peers.teacache import fit_coefficients, measured_changes, polynomial

X = 100.0
TIMESTEPS = [1.0, 1.1, 1.32, 1.32, 1.33]  # changes .1, .2, 0, .0076


def _model() -> HandModel:
    """m = t, residual t + 0; the final layer adds 1000 t."""
    return HandModel(HandBlock(shift_a=lambda t: t, shift_f=constant(0.0)), final=1000.0)


def _run(reference: TeaCache, timesteps: list[float]) -> list[float]:
    """Predictions less 1000 t, for x = 100 + step: the residual that was added."""
    return [float(reference(*inputs(t, X + j))) - 1000 * t - X - j for j, t in enumerate(timesteps)]


def test_changes_accumulate_until_the_threshold() -> None:
    """.1 < .25: the residual 1 of step 0; .1 + .2 computes; 0 reuses the 1.32; the last step computes."""
    reference = TeaCache(_model(), steps=5, threshold=0.25)
    assert _run(reference, TIMESTEPS) == pytest.approx([1.0, 1.0, 1.32, 1.32, 1.33])
    assert reference.kinds == ["full", "teacache", "full", "teacache", "full"]
    assert reference.margin == pytest.approx(0.05, abs=1e-5)


def test_changes_are_from_step_to_step() -> None:
    """.1 + .2 < .35, whereas from the last computed step it would be .1 + .32."""
    reference = TeaCache(_model(), steps=5, threshold=0.35)
    assert _run(reference, TIMESTEPS) == pytest.approx([1.0, 1.0, 1.0, 1.0, 1.33])
    assert reference.kinds == ["full", "teacache", "teacache", "teacache", "full"]


def test_the_polynomial_scales_the_changes() -> None:
    """p(v) = 2 v^2 + .05: .07, then .07 + .13, reaches .2 only with the third: + .05."""
    reference = TeaCache(_model(), steps=6, threshold=0.21, coefficients=(2.0, 0.0, 0.05))
    _run(reference, [*TIMESTEPS, 1.34])
    assert reference.kinds == ["full", "teacache", "teacache", "full", "teacache", "full"]


def test_threshold_zero_computes_everything() -> None:
    reference = TeaCache(_model(), steps=5, threshold=0.0)
    _run(reference, TIMESTEPS)
    assert reference.kinds == ["full"] * 5


def test_polynomial_has_the_highest_power_first() -> None:
    assert polynomial((2.0, 3.0, 5.0), 10.0) == 235.0
    assert polynomial((1.0, 0.0), 0.3) == 0.3


def test_fit_recovers_a_polynomial_and_averages_noise() -> None:
    exact = (3.0, -2.0, 0.5, 1.5, 0.1)
    changes = [(v, polynomial(exact, v)) for v in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert fit_coefficients(changes) == pytest.approx(exact, abs=1e-9)
    # the line closest to (0, 0), (1, 3), (2, 3): slope 3 / 2, mean 2 at 1
    assert fit_coefficients([(0.0, 0.0), (1.0, 3.0), (2.0, 3.0)], degree=1) == pytest.approx([1.5, 0.5])


def test_measured_changes() -> None:
    """m: 1, 1.1, 1.32; prediction at x = 0 without the final layer's part: the same."""
    model = HandModel(HandBlock(shift_a=lambda t: t, shift_f=lambda t: t))  # prediction x + 2 t
    changes = measured_changes(model, [inputs(t, 0.8) for t in (1.0, 1.1, 1.32)])
    assert [change[0] for change in changes] == pytest.approx([0.1, 0.2], abs=1e-6)
    assert [change[1] for change in changes] == pytest.approx([0.2 / 2.8, 0.44 / 3.0], abs=1e-6)
