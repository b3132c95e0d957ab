"""The output forecast on a model whose prediction is a known function of the step."""

import pytest

from tests.policies.peers.hand_model import HandBlock, HandModel, constant, inputs
from tests.reference.peers import Forecast


def _run(reference: Forecast, steps: int) -> list[float]:
    """Predictions for x = 0 at t = 0, 1, 2, ..."""
    return [float(reference(*inputs(float(j), 0.0))) for j in range(steps)]


def _square() -> HandModel:
    return HandModel(HandBlock(shift_a=lambda t: t * t, shift_f=constant(0.0)))


def test_order_one() -> None:
    """Full at 0, 1, 5, 9. Slope 1 from 0 and 1; (25 - 1) / 4 = 6 from 1 and 5."""
    reference = Forecast(_square(), order=1, interval=4)
    assert _run(reference, 10) == [0, 1, 2, 3, 4, 25, 31, 37, 43, 81]
    assert reference.kinds == ["full", *(["full"] + ["forecast"] * 3) * 2, "full"]


def test_order_two() -> None:
    """At 5: F1 = 6, F2 = (6 - 1) / 4."""
    reference = Forecast(_square(), order=2, interval=4)
    assert _run(reference, 8)[6:] == pytest.approx([25 + 6 + 1.25 / 2, 25 + 12 + 1.25 * 4 / 2])


def test_order_zero_holds() -> None:
    reference = Forecast(_square(), order=0, interval=4)
    assert _run(reference, 6) == [0, 0, 0, 0, 16, 16]
    assert reference.kinds == ["full", "forecast", "forecast", "forecast", "full", "forecast"]


def test_warmup() -> None:
    """Full at 0, 1, 2 and 6; F = 4, 3, 2 at 2."""
    reference = Forecast(_square(), order=2, interval=4, warmup=3)
    assert _run(reference, 7) == [0, 1, 4, 4 + 3 + 1, 4 + 6 + 4, 4 + 9 + 9, 36]


def test_only_full_steps_run_the_model() -> None:
    model = _square()
    _run(Forecast(model, order=1, interval=4), 10)
    block = model.blocks[0]
    assert isinstance(block, HandBlock)
    assert block.attn.rows == block.mlp.rows == 4
