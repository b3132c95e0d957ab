"""FORA and TaylorSeer on a block whose sublayers and gates are known functions of the timestep."""

import pytest

from tests.policies.peers.hand_model import HandBlock, HandModel, constant, inputs
from tests.reference.peers import FORA, Reference, TaylorSeer

X = 100.0


def _model() -> HandModel:
    """Attention t, feed-forward t^2; gates 1 + t and 2; the final layer adds 1000 t."""
    block = HandBlock(shift_a=lambda t: t, shift_f=lambda t: t * t, gate_a=lambda t: 1 + t, gate_f=constant(2.0))
    return HandModel(block, final=1000.0)


def _run(reference: Reference, timesteps: list[float]) -> list[float]:
    """Predictions less 1000 t, for x = 100 + step: what the block made of it."""
    return [float(reference(*inputs(t, X + j))) - 1000 * t - X - j for j, t in enumerate(timesteps)]


def test_fora_reuses_outputs_under_current_gates() -> None:
    """t = 1: 2 * 1 + 2 * 1; then attention 1 and feed-forward 1 under gates 3 and 4; t = 4: 5 * 4 + 2 * 16."""
    reference = FORA(_model(), interval=3)
    assert _run(reference, [1, 2, 3, 4]) == pytest.approx([4, 3 + 2, 4 + 2, 52])
    assert reference.kinds == ["full", "fora", "fora", "full"]


def test_taylorseer_forecasts_outputs_under_current_gates() -> None:
    """Full at 0, 1, 4.

    Slopes 1 and 1 at first: 2: 3 * 2 + 2 * 2; 3: 4 * 3 + 2 * 3. 4: 5 * 4 + 2 * 16. Slopes then: attention
    (4 - 1) / 3 = 1, feed-forward (16 - 1) / 3 = 5. 5: 6 * 5 + 2 * 21.
    """
    reference = TaylorSeer(_model(), order=1, interval=3)
    assert _run(reference, [0, 1, 2, 3, 4, 5]) == pytest.approx([0, 4, 10, 18, 52, 72])
    assert reference.kinds == ["full", "full", "taylorseer", "taylorseer", "full", "taylorseer"]


def test_taylorseer_second_order() -> None:
    """At 4 the feed-forward has F2 = (5 - 1) / 3, the attention 0: at 5, 6 * 5 + 2 * (21 + 4 / 6)."""
    last = _run(TaylorSeer(_model(), order=2, interval=3), [0, 1, 2, 3, 4, 5])[5]
    assert last == pytest.approx(30 + 2 * (21 + 4 / 6))


def test_taylorseer_of_order_zero_is_fora() -> None:
    timesteps = [1.0, 2.0, 3.0, 4.0, 5.0]
    held = _run(TaylorSeer(_model(), order=0, interval=3, warmup=1), timesteps)
    assert held == _run(FORA(_model(), interval=3), timesteps)


def test_cached_steps_run_no_sublayer() -> None:
    for reference, full in ((FORA(model := _model(), interval=3), 2), (TaylorSeer(other := _model(), interval=3), 3)):
        _run(reference, [0, 1, 2, 3, 4, 5])
        block = (model if full == 2 else other).blocks[0]
        assert isinstance(block, HandBlock)
        assert block.attn.rows == block.mlp.rows == full
