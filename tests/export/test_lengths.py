"""Lengths as an input: what steps are given, and that a step which needed more runs again and is right."""

from pathlib import Path

import pytest
import torch

from moeca_fx import MoECa
from moeca_fx.export import load, to_onnx
from moeca_fx.export.lengths import GivenList, Lengths
from tests.helpers.toys import toy_inputs
from tests.helpers.transformed import run, toy_pair

ROWS, QUERIES, GROUP = (
    GivenList("a/rows", "rows", 6),
    GivenList("a/queries", "queries", 6),
    GivenList("b/group", "group", 6, top_k=2, experts=4),
)
POLICY = MoECa(interval=3, tau0=0.6)


def _attempt(lengths: Lengths, needed: list[int], step: str = "cached") -> list[list[int]]:
    """What a step of two samples is given until it is enough."""
    tried = []
    for given in lengths.attempts(step, 2):
        tried.append(given.tolist())
        if lengths.enough(step, 2, given, torch.tensor(needed)):
            return tried
    raise AssertionError(f"never enough: {tried}")


def test_a_first_step_is_given_all_tokens_and_twice_an_even_share_of_branches() -> None:
    assert _attempt(Lengths([ROWS, QUERIES, GROUP]), [1, 1, 1]) == [[12, 6, 12]]
    assert [each.most(2) for each in (ROWS, QUERIES, GROUP)] == [12, 6, 24]


def test_the_next_step_is_given_a_fourth_more_than_was_needed_and_never_more_than_there_is() -> None:
    lengths = Lengths([ROWS, QUERIES, GROUP])
    _attempt(lengths, [4, 6, 8])
    assert _attempt(lengths, [5, 6, 9]) == [[5, 6, 10]]
    assert lengths.repeated == 0


def test_a_list_that_was_too_short_is_given_more() -> None:
    lengths = Lengths([ROWS, QUERIES, GROUP])
    assert _attempt(lengths, [1, 1, 20]) == [[12, 6, 12], [2, 2, 24]]
    assert lengths.repeated == 1
    # every step of its own, and every batch
    assert _attempt(lengths, [1, 1, 1], "full") == [[12, 6, 12]]


def test_what_an_attempt_saw_less_of_is_not_forgotten() -> None:
    lengths = Lengths([ROWS, GROUP])
    _attempt(lengths, [1, 1])
    given = lengths.attempts("cached", 2)
    assert not lengths.enough("cached", 2, next(given), torch.tensor([4, 1]))
    assert not lengths.enough("cached", 2, next(given), torch.tensor([2, 8]))
    assert next(given).tolist() == [5, 10]


def test_at_last_all_entries_are_given() -> None:
    lengths = Lengths([GROUP])
    _attempt(lengths, [2])
    tried = []
    for given in lengths.attempts("cached", 2):
        tried.append(given.item())
        lengths.enough("cached", 2, given, given + 1 if given.item() < 24 else given)
    assert tried[-1] == 24 and tried == sorted(tried)


@pytest.mark.artefact
@pytest.mark.parametrize("graphs", ["one", "steps"])
def test_a_step_that_needed_more_runs_again_and_is_right(graphs: str, tmp_path: Path) -> None:
    model, fast = toy_pair(POLICY)
    manifest = to_onnx(
        model,
        tmp_path,
        toy_inputs(),
        policy=POLICY,
        batch=(1, 2, 5),
        graphs=graphs,
        lengths="input",
        check=False,  # type: ignore[arg-type]  # a form
    )
    assert any(graph["lists"] for graph in manifest.graphs)
    assert not any(graph["in_place"] for graph in manifest.graphs)  # a step that runs again finds its caches
    artefact = load(tmp_path)
    (start,), (drift,) = toy_inputs(3)[:1], toy_inputs(3, seed=1)[:1]
    steps = [(start + 0.05 * step * drift, torch.full((3,), 0.02 * step)) for step in range(12)]
    found = []
    repeated = 0
    with torch.no_grad():
        for inputs in steps:
            for loaded in artefact._runtime.artefact.loaded.values():  # each step is given too little at first
                loaded.lengths._last = {key: [2] * len(needed) for key, needed in loaded.lengths._last.items()}
            found.append(artefact(*inputs).clone())
    for have, want in zip(found, run(fast, steps), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    assert artefact.stats() == fast.stats() and fast.stats().reuse_ratio > 0
    repeated = sum(loaded.lengths.repeated for loaded in artefact._runtime.artefact.loaded.values())
    assert repeated >= len(steps) // 2
