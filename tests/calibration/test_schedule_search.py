"""The dynamic programme against brute force, and gap costs against what they claim to be."""

import itertools
import math

import pytest
import torch

from moeca_fx.calibration import Metric, best_schedule, find_law, gap_costs, record, schedule_search, state_metric
from moeca_fx.errors import InputError
from tests.calibration.samplers import bent, euler, noise, polynomial


def total_cost(costs: torch.Tensor, full: tuple[int, ...]) -> float:
    """Cost of a schedule, added up gap by gap."""
    steps, width, _ = costs.shape
    total = 0.0
    for index, last in enumerate(full):
        following = full[index + 1] if index + 1 < len(full) else steps
        back = last - full[index - 1] if index else 0
        total += costs[last, back, following - last].item() if max(back, following - last) < width else math.inf
    return total


def random_costs(steps: int, reach: int, seed: int) -> torch.Tensor:
    """Costs of every gap that exists, the others infinite."""
    costs = torch.rand(steps, reach + 1, reach + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for last, back, ahead in itertools.product(range(steps), range(reach + 1), range(reach + 1)):
        exists = (back > 0 or last == 0) and back <= last and 0 < ahead <= steps - last
        costs[last, back, ahead] = costs[last, back, ahead] if exists else math.inf
    return costs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("full_steps", "reach"), [(1, 9), (2, 9), (4, 9), (4, 4), (9, 9)])
def test_equals_brute_force(seed: int, full_steps: int, reach: int) -> None:
    steps = 9
    costs = random_costs(steps, reach, seed)
    every = [(0, *rest) for rest in itertools.combinations(range(1, steps), full_steps - 1)]
    expected = min(every, key=lambda full: total_cost(costs, full))
    found = best_schedule(costs, full_steps)
    assert found == expected
    assert math.isfinite(total_cost(costs, found))


def test_too_short_a_reach_is_refused() -> None:
    with pytest.raises(InputError, match="longer reach"):
        best_schedule(random_costs(12, 3, 0), 3)


@pytest.mark.parametrize("full_steps", [0, 13])
def test_an_impossible_number_of_steps_is_refused(full_steps: int) -> None:
    with pytest.raises(InputError, match="between 1 and 12"):
        best_schedule(random_costs(12, 12, 0), full_steps)


def test_gaps_that_a_line_bridges_cost_nothing() -> None:
    steps = 8
    sampler = euler(noise(4, 0), steps)
    recording = record(sampler, polynomial(1, 4, 1))
    costs = gap_costs(recording, find_law(sampler, recording), state_metric(steps), inputs=False, reach=steps)
    known_pair = costs[1:, 1:, :]
    assert known_pair[torch.isfinite(known_pair)].max() < 1e-9
    assert costs[0, 0, 4] > 1e-3  # one value does not show the slope


def test_a_held_gap_costs_what_hand_arithmetic_says() -> None:
    # v = t^2 c with c the same for all; weights fit each step, so only step 0's gap (v = 0 there) cannot be bridged.
    steps = 4
    sampler = euler(noise(2, 0), steps)
    recording = record(sampler, lambda x, t: torch.full_like(x, t * t))
    costs = gap_costs(recording, find_law(sampler, recording), state_metric(steps), inputs=False, reach=steps)
    missing = (1 / 16 + 4 / 16) / steps  # v at steps 1 and 2, held at 0, divided by the number of steps
    assert costs[0, 0, 3].item() == pytest.approx(36 * missing**2)  # 2 samples of 18 values
    assert costs[0, 0, 1].item() == 0.0
    assert costs[1, 1, 2].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("projected", [False, True])
def test_many_samples_are_judged_by_the_first_of_them(projected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 6
    recordings = [record(euler(noise(6, 0)[:count], steps), bent) for count in (6, 2)]
    laws = [find_law(euler(noise(6, 0)[:count], steps), rec) for count, rec in zip((6, 2), recordings, strict=True)]
    metric = state_metric(steps)
    if projected:
        directions = torch.randn(
            steps + 1, 3, *recordings[0].states.shape[1:], generator=torch.Generator().manual_seed(0)
        )
        metric = Metric(directions, metric.gains)
    few = gap_costs(recordings[1], laws[1], metric.of(2), inputs=True, reach=steps)
    whole = gap_costs(recordings[0], laws[0], metric, inputs=True, reach=steps)
    monkeypatch.setattr(schedule_search, "VALUES", 2 * recordings[0].states.shape[2])
    thinned = gap_costs(recordings[0], laws[0], metric, inputs=True, reach=steps)
    torch.testing.assert_close(thinned, few)
    assert not torch.allclose(thinned, whole)


def test_full_steps_go_where_the_trajectory_bends() -> None:
    steps = 40
    sampler = euler(noise(6, 0), steps)
    recording = record(sampler, bent)
    costs = gap_costs(recording, find_law(sampler, recording), state_metric(steps), inputs=False, reach=20)
    full = best_schedule(costs, 10)
    near = sum(abs(step / steps - 0.7) <= 0.15 for step in full)
    assert near >= 5  # 3 of 10 would be an even share
