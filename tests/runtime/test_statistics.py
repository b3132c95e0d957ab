"""Statistics: exact on a constructed run, true FLOPs, memory as estimated, and one warning when nothing is reused."""

import json
import warnings

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa, NothingReusedWarning, OtherLengthWarning, policies
from moeca_fx.graph.sites import MoESite
from moeca_fx.runtime.flops import flop_counter
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.toys import PICKS, TOKENS, toy, toy_inputs
from tests.helpers.transformed import SOME, run, toy_pair, zoo_pair
from tests.helpers.zoo_models import Family

EVERYTHING, NOTHING = MoECa(interval=3, tau0=0.0), MoECa(interval=3, tau0=50.0)


def _steps(count: int, batch: int = 2, change: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    grid, _ = toy_inputs(batch)
    return [(grid + change * index, torch.full((batch,), 0.001 * index)) for index in range(count)]


@pytest.mark.parametrize(("policy", "share"), [(EVERYTHING, 1), (NOTHING, 0)], ids=["0 % reused", "100 % reused"])
def test_exact_counts_at_both_ends(policy: MoECa, share: int) -> None:
    """Six steps of two samples at interval 3: four cached ones, on inputs that route as before."""
    model, fast = toy_pair(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingReusedWarning)
        found = run(fast, _steps(6))
        stats = fast.stats()
    rows = 4 * 2 * TOKENS
    assert (stats.full_steps, stats.cached_steps, stats.trajectories) == (2, 4, 1)
    assert (stats.branches, stats.matched_branches) == (rows * PICKS, rows * PICKS)
    assert (stats.recomputed_branches, stats.attention_rows) == (share * rows * PICKS, share * rows)
    assert (stats.match_ratio, stats.reuse_ratio, stats.reuse_over_match) == (1, 1 - share, 1 - share)
    by_kind = {site.kind: site for site in stats.sites}
    assert [site.path for site in stats.sites] == ["storeys.0.mixing", "storeys.0.layer"]
    moe, attention = by_kind["moe"], by_kind["attention"]
    assert (moe.branches, moe.matched, moe.recomputed) == (rows * PICKS, rows * PICKS, share * rows * PICKS)
    assert (attention.rows, attention.rows_recomputed) == (rows, share * rows)
    assert (attention.branches, attention.recomputed, attention.match_ratio) == (0, 0, 0.0)
    assert (stats.flops_saved > 0) == (share == 0)
    with torch.no_grad():
        error = float((found[1] - model(*_steps(2)[1])).abs().max())
    assert error < 1e-5 if share else error > 0


def _counted(fast: TransformedModel, steps: list[tuple[Tensor, ...]]) -> int:
    """FLOPs that a counter sees while the calls really run."""
    with flop_counter() as counter:
        run(fast, steps)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", ["dsmoe", "ditmoe"])
def test_flops_are_those_that_ran(family: Family) -> None:
    model, fast = zoo_pair(family)
    steps: list[tuple[Tensor, ...]] = list(zoo_models.trajectory(3, steps=6))
    seen = _counted(fast, steps)
    stats = fast.stats()
    assert 0 < stats.recomputed_branches < stats.branches
    assert stats.flops_executed == seen
    fast.reset()
    assert stats.flops_uncached == 6 * _counted(fast, steps[:1])
    assert stats.flops_saved == stats.flops_uncached - stats.flops_executed
    assert stats.flops_speedup == stats.flops_uncached / stats.flops_executed
    with flop_counter() as counter, torch.no_grad():
        model(*steps[0])
    # Grouping changes no work; the weighted sum of branches has become a product, which counts.
    branches = 3 * zoo_models.TOKENS * sum(site.top_k for site in _moe_sites(fast))
    assert stats.flops_uncached == 6 * (counter.get_total_flops() + 2 * branches * 32)


def _moe_sites(fast: TransformedModel) -> tuple[MoESite, ...]:
    return next(iter(fast._moeca.programs.values())).sites.moe


def test_batches_and_contexts_add_up_and_reset_clears() -> None:
    _, fast = toy_pair(SOME)
    run(fast, _steps(3, batch=2))
    with fast.context("other"):
        run(fast, _steps(2, batch=3, change=0.1))
    stats = fast.stats()
    assert (stats.full_steps, stats.cached_steps, stats.trajectories) == (2, 3, 2)
    assert stats.branches == (2 * 2 + 3) * TOKENS * PICKS
    fast.reset_stats()
    cleared = fast.stats()
    assert (cleared.full_steps, cleared.cached_steps, cleared.branches, cleared.flops_executed) == (0, 0, 0, 0)
    assert cleared.flops_speedup == 1.0 and cleared.match_ratio == 0.0
    run(fast, _steps(4)[3:])  # the trajectory went on
    assert fast.stats().cached_steps == 1


def test_statistics_print_and_become_json() -> None:
    _, fast = toy_pair(SOME)
    run(fast, _steps(3, change=0.1))
    stats = fast.stats()
    content = json.loads(json.dumps(stats.as_dict()))
    assert content["cached_steps"] == 2 and len(content["sites"]) == 2
    assert content["sites"][1]["match_ratio"] == stats.sites[1].match_ratio
    text = str(stats)
    assert "1 full and 2 cached steps in 1 trajectories" in text
    assert "storeys.0.layer" in text and "storeys.0.mixing" in text


@pytest.mark.parametrize(
    "policy", [MoECa(), MoECa(attention="full", dense_ffn="full", shared_expert="full")], ids=["caches", "few"]
)
@pytest.mark.parametrize("batch", [3])
def test_memory_is_what_was_estimated_and_what_is_held(policy: MoECa, batch: int) -> None:
    model, fast = zoo_pair("dsmoe", policy)
    assert fast.memory().total == 0
    run(fast, list(zoo_models.trajectory(batch, steps=2)))
    held = fast.memory()
    tensors = fast.cache()
    assert dict(held.states) == {name: t.numel() * t.element_size() for name, t in tensors.items()}
    # The memory is really the caches' own: no cache keeps a larger tensor alive.
    assert held.total == sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}.values()
    )
    estimated = moeca_fx.estimate_memory(model, zoo_models.inputs(), policy=policy, batch=batch)
    assert estimated == held
    assert held.batch == batch and held.total == sum(size for _, size in held.sites)
    assert json.loads(json.dumps(held.as_dict()))["total"] == held.total
    assert "blocks.1.mlp" in str(held)


def test_memory_of_two_contexts_adds_up() -> None:
    _, fast = toy_pair(SOME)
    run(fast, _steps(1))
    one = fast.memory()
    with fast.context("other"):
        run(fast, _steps(1))
    assert fast.memory().total == 2 * one.total and fast.memory().batch == 4


def _warned(policy: MoECa, calls: list[tuple[Tensor, Tensor]], again: bool = True) -> str:
    """The one warning of these calls followed by a reset; it is given once, however often it is deserved."""
    _, fast = toy_pair(policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(fast, calls)
            fast.reset()
        fast.stats()
    mine = [w for w in caught if issubclass(w.category, NothingReusedWarning)]
    assert len(mine) == 1
    return str(mine[0].message)


def test_warning_names_each_reason() -> None:
    steps = _steps(3)
    assert "interval=1 makes every step full" in _warned(MoECa(interval=1), steps)
    message = _warned(EVERYTHING, steps)
    assert "every branch was recomputed on all 2 cached steps; raise tau0" in message
    message = _warned(SOME, [steps[0], steps[0]])
    assert "did not move" in message and "with model.context('cond')" in message
    assert "batch size changed from 2 to 3" in _warned(SOME, [steps[0], _steps(1, batch=3)[0]])
    grid, clock = steps[0]
    assert "shape, dtype or device" in _warned(SOME, [(grid, clock), (grid[:, :4], clock)])
    assert "reset() was called" in _warned(SOME, steps[:1])


def test_no_warning_when_something_was_reused() -> None:
    _, fast = toy_pair(NOTHING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fast, _steps(3))
        run(fast, _steps(3))
        fast.stats()
        fast.reset()


def test_the_warning_points_at_the_users_line() -> None:
    _, fast = toy_pair(MoECa(interval=1))
    first, second = _steps(2)
    fast(*first)
    with pytest.warns(NothingReusedWarning) as caught:  # a cycle of one step has run and reused nothing
        fast(*second)
    assert caught[0].filename == __file__


def test_stats_warns_while_the_run_goes_on() -> None:
    _, fast = toy_pair(EVERYTHING)
    run(fast, _steps(3))
    with pytest.warns(NothingReusedWarning, match="every branch was recomputed"):
        fast.stats()


def test_stats_in_the_warm_up_says_nothing() -> None:
    _, fast = toy_pair(None)
    seer = fast.with_policy("taylorseer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(seer, _steps(2))
        seer.stats()
    with pytest.warns(NothingReusedWarning, match="it was over before"):
        seer.reset()


def test_a_trajectory_of_another_length_than_the_policy_was_made_for() -> None:
    _, fast = toy_pair(None)
    listed = policies.build("sublayer_forecast", steps=4, full=(0, 2))
    exact, longer, shorter = (fast.with_policy(listed) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(exact, _steps(4))
        run(exact, _steps(4))
        run(longer, _steps(4))
        run(shorter, _steps(3))
    with pytest.warns(OtherLengthWarning, match="of 4 steps, this one goes on after 4"):
        longer(*_steps(5)[4])
    with pytest.warns(OtherLengthWarning, match="of 4 steps, this one ended after 3"):
        shorter(*_steps(1)[0])


def test_estimate_refuses_a_batch_below_one() -> None:
    with pytest.raises(moeca_fx.errors.ConfigError, match="batch: expected an integer >= 1, found 0"):
        moeca_fx.estimate_memory(toy(), toy_inputs(), batch=0)
