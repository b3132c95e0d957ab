"""First-block cache and DBCache on three blocks that add known functions of the timestep."""

import pytest

from tests.policies.peers.hand_model import HandBlock, HandModel, constant, inputs
from tests.reference.peers import DBCache, FirstBlockCache

X = 100.0
TIMESTEPS = [1.0, 1.05, 1.1, 1.15]  # against the last computed: .05, .1 (computed), .045


def _model() -> HandModel:
    """Blocks: + t, + 10 t^2, doubled; the final layer adds 1000 t."""
    zero = constant(0.0)
    return HandModel(
        HandBlock(shift_a=lambda t: t, shift_f=zero),
        HandBlock(shift_a=zero, shift_f=lambda t: 10 * t * t),
        HandBlock(shift_a=zero, shift_f=zero, gate_f=zero, blind=False),
        final=1000.0,
    )


def _run(reference: DBCache, timesteps: list[float]) -> list[float]:
    """Predictions less 1000 t, for x = 100 + step."""
    return [float(reference(*inputs(t, X + j))) - 1000 * t for j, t in enumerate(timesteps)]


def test_the_middle_is_reused_and_the_last_blocks_run() -> None:
    """2 (x + t + middle), the middle being 10, 10, 12.1, 12.1.

    Step 2 compares with step 0 (.1), not with step 1 (.048).
    """
    reference = DBCache(_model(), first=1, last=1, threshold=0.08)
    expected = [2 * (X + 11.0), 2 * (X + 1 + 11.05), 2 * (X + 2 + 13.2), 2 * (X + 3 + 13.25)]
    assert _run(reference, TIMESTEPS) == pytest.approx(expected)
    assert reference.kinds == ["full", "dbcache", "full", "dbcache"]
    assert reference.margin == pytest.approx(0.02)


def test_first_block_cache_reuses_all_that_follows() -> None:
    """The residual after block 1 at step 0: 2 (100 + 11) - 101 = 121; at step 1: 101 + 1.05 + 121."""
    reference = FirstBlockCache(_model(), threshold=0.08)
    expected = [222.0, 223.05, 2 * (X + 2 + 13.2), X + 3 + 1.15 + (2 * (X + 2 + 13.2) - (X + 2 + 1.1))]
    assert _run(reference, TIMESTEPS) == pytest.approx(expected)
    assert reference.kinds == ["full", "firstblockcache", "full", "firstblockcache"]


def test_the_residual_of_all_first_blocks_decides() -> None:
    """F = 2: R = t + 10 t^2 moves by 1.075 / 11 = .098 at step 1."""
    reference = DBCache(_model(), first=2, last=1, threshold=0.08)
    _run(reference, TIMESTEPS[:2])
    assert reference.kinds == ["full", "full"]
    assert reference.margin == pytest.approx(1.075 / 11 - 0.08)


def test_reused_steps_skip_the_middle_only() -> None:
    model = _model()
    _run(DBCache(model, first=1, last=1, threshold=10.0), TIMESTEPS)
    assert [block.attn.rows for block in model.blocks] == [4, 1, 4]  # type: ignore[union-attr]
