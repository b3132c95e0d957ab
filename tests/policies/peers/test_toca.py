"""ToCa and DuCa against their references: schedule, chosen tokens, and what is made of them."""

import pytest

from moeca_fx.policies import build
from tests.helpers.grids import spread
from tests.helpers.zoo_models import Family
from tests.policies.peers.cases import trajectory
from tests.policies.peers.compare import compare
from tests.reference.peers import DuCa, ToCa
from tests.reference.peers.schedules import toca_full_steps

STEPS = 12
FAMILIES: tuple[Family, ...] = ("dsmoe", "ditmoe-packed")


@pytest.mark.parametrize(("name", "family"), spread(["toca", "duca"], FAMILIES))
def test_some_tokens_are_recomputed(family: Family, name: str) -> None:
    """From most tokens in the first block to one or none in the last; every sample chooses its own."""
    method = build(name, steps=STEPS, interval=4, fresh_ratio=0.17)
    kind = ToCa if name == "toca" else DuCa
    for seed in (0, 4, 8):
        steps = list(trajectory(batch=3, steps=STEPS, seed=seed))
        reference = compare(family, method, lambda model: kind(model, STEPS, 4, fresh_ratio=0.17), steps, depth=3)
        assert {"full", "toca"} <= set(reference.kinds)
        assert ("aggressive" in reference.kinds) == (name == "duca")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_may_recompute_no_token(family: Family) -> None:
    """The published ratio on 16 tokens leaves none for the last block."""
    method = build("toca", steps=STEPS)
    reference = compare(family, method, lambda model: ToCa(model, STEPS), list(trajectory(steps=4)), depth=3)
    assert isinstance(reference, ToCa)
    assert reference.ages[2] == [[3] * 16] * 2
    assert 0 in reference.ages[0][0]


@pytest.mark.parametrize("steps", [8, 12, 20, 250])
def test_schedule(steps: int) -> None:
    """On the schedule alone: what the whole trajectory of a published length would be."""
    schedule, memory, found = build("toca", steps=steps).policy().schedule, None, []
    for j in range(steps):
        chosen, memory = schedule.choose(j, float("nan"), memory)
        found.append(chosen < 0)
    assert found == toca_full_steps(steps, 4)
