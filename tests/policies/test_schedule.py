"""Which steps are full, written out by hand for every schedule."""

import math
from typing import Any

import pytest

from moeca_fx.errors import ConfigError
from moeca_fx.policies.methods.dbcache import FirstBlocksChange
from moeca_fx.policies.methods.teacache import AccumulatedChange
from moeca_fx.policies.methods.toca import ToCaSchedule
from moeca_fx.policies.schedule import FULL, Cycle, Listed, Schedule


def _choices(schedule: Schedule, steps: int, changes: list[float] | None = None) -> list[int]:
    memory: Any = None
    found = []
    for step in range(steps):
        chosen, memory = schedule.choose(step, changes[step] if changes else math.nan, memory)
        found.append(chosen)
    return found


def _full(schedule: Schedule, steps: int, changes: list[float] | None = None) -> list[int]:
    return [step for step, chosen in enumerate(_choices(schedule, steps, changes)) if chosen == FULL]


def test_cycle() -> None:
    assert _full(Cycle(4), 10) == [0, 4, 8]
    assert _full(Cycle(4, warmup=2), 12) == [0, 1, 5, 9]
    assert _full(Cycle(1), 3) == [0, 1, 2]


def test_listed_is_full_past_its_end() -> None:
    assert _full(Listed((0, 2, 3), 6), 8) == [0, 2, 3, 6, 7]


@pytest.mark.parametrize("full", [(), (1, 2), (0, 2, 2), (0, 3, 1), (0, 9), (0, 1.5), (0, True)])
def test_listed_refuses(full: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=r"Listed\.full: expected"):
        Listed(full, 6)


def test_toca_has_72_full_steps_of_250() -> None:
    assert len(_full(ToCaSchedule(250, 4), 250)) == 72


def test_duca_takes_its_rules_in_turn() -> None:
    choices = _choices(ToCaSchedule(250, 4, rules=2), 20)
    assert choices[0] == FULL
    between = choices[1 : choices.index(FULL, 1)]
    assert between == [step % 2 for step in range(len(between))] and len(between) >= 2


def test_accumulated_change() -> None:
    # Identity: .4 + .4 < 1, then 1.2 >= 1 is full and starts from 0; the last step is full.
    schedule = AccumulatedChange(1.0, 8, (1.0, 0.0))
    assert _full(schedule, 8, [math.nan] + [0.4] * 7) == [0, 3, 6, 7]


def test_accumulated_change_through_a_polynomial() -> None:
    # p(m) = 2 m^2 + 1: p(.5) = 1.5 < 2, 3.0 >= 2
    schedule = AccumulatedChange(2.0, 9, (2.0, 0.0, 1.0))
    assert _full(schedule, 5, [math.nan] + [0.5] * 4) == [0, 2, 4]


def test_first_blocks_change() -> None:
    schedule = FirstBlocksChange(0.1, first=1, warmup=2)
    assert _full(schedule, 6, [math.nan, 0.01, 0.05, 0.1, 0.099, math.nan]) == [0, 1, 3, 5]
