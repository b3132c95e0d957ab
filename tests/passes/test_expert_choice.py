"""Sites whose experts choose their tokens: located, vectorised, cached, and refused where a rule has no meaning."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.errors import ExportError, UnsupportedModelError
from moeca_fx.export import to_pt2
from moeca_fx.graph.expert_stack import stack_experts
from moeca_fx.graph.state import StateSpec
from moeca_fx.graph.storage import CacheDtype
from moeca_fx.ops import chosen, dispatch
from moeca_fx.ops.experts import MARKERS
from moeca_fx.passes.vectorize_experts import vectorize_experts
from moeca_fx.policies import Method
from moeca_fx.policies.methods.branch_forecast import BranchForecast
from moeca_fx.policies.rules import BranchRule, SublayerRule
from moeca_fx.runtime.flops import flop_counter
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.compiled import Vectorized, run_steps, vectorized
from tests.helpers.expert_choice_toys import LOTS, Market, market_toy
from tests.helpers.grids import slow
from tests.helpers.passes import check_pass, staged
from tests.helpers.toys import POOL, TOKENS, WIDTH, Toy, toy_inputs
from tests.policies.every import STEPS, every_method, label

SOME = MoECa(tau0=0.8)
SITE = "storeys.0.layer"


@cache
def _pair() -> tuple[Toy, TransformedModel]:
    model = market_toy()
    return model, moeca_fx.transform(model, toy_inputs(), policy=None)


def _under(policy: Method) -> tuple[Toy, TransformedModel]:
    model, plain = _pair()
    return model, plain.with_policy(policy)


def _steps(count: int, batch: int = 2, change: float = 0.2) -> list[tuple[Tensor, Tensor]]:
    grid, _ = toy_inputs(batch)
    noise = torch.randn(count, *grid.shape, generator=torch.Generator().manual_seed(1)).cumsum(0)
    return [(grid + change * noise[step], torch.full((batch,), 0.1 + 0.05 * step)) for step in range(count)]


def _run(fast: TransformedModel, steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [fast(*step).clone() for step in steps]


def test_the_site_and_why_its_attention_is_not_synchronized() -> None:
    sites = staged(market_toy(), toy_inputs()).sites
    (site,) = sites.moe
    assert (site.layout, site.slots, site.branches, site.held) == ("expert", (POOL, LOTS), POOL * LOTS, "token")
    assert site.router == f"expert choice, softmax, top-{LOTS}"
    assert site.shared_path == f"{SITE}.constant" and site.attention == "storeys.0.mixing"
    assert site.not_synchronized is not None and "each expert takes its tokens" in site.not_synchronized


@pytest.mark.parametrize("flat", [False, True])
def test_two_markers_become_two_programs(flat: bool) -> None:
    layer = partial(Market, flat=flat, fair=True)
    stage = staged(market_toy(layer, layer), toy_inputs())
    stack_experts(stage.model, tuple(stage.captured.regions.values()))
    sites = stage.sites
    examples = [toy_inputs(seed=1), toy_inputs(1, seed=2), toy_inputs(5, seed=3)]
    made = (chosen.plan_chosen, chosen.ungroup_chosen, chosen.combine_chosen, dispatch.take_rows)

    def run(module: torch.fx.GraphModule) -> None:
        nonlocal sites
        sites = vectorize_experts(module, sites, stage.captured.regions, stage.model)

    with torch.no_grad(), stage.live():
        ops = {MARKERS["expert"]: (2, 0), MARKERS["token"]: (0, 0), **dict.fromkeys(made, (0, 2))}
        check_pass(stage.normalized, run, examples, ops, tolerance=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_without_a_policy_it_is_the_model(batch: int) -> None:
    model, fast = _pair()
    for inputs in _steps(2, batch):
        expected = model(*inputs)
        assert float((fast(*inputs) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    _, fast = _under(SOME)
    together = _run(fast, _steps(6, batch=3))
    reused = fast.stats().sites
    alone = [[(grid[b : b + 1], clock[b : b + 1]) for grid, clock in _steps(6, batch=3)] for b in range(3)]
    for b, steps in enumerate(alone):
        fast.reset()
        for step, (found, expected) in enumerate(zip(_run(fast, steps), together, strict=True)):
            torch.testing.assert_close(found[0], expected[b], rtol=1e-5, atol=1e-6, msg=f"sample {b}, step {step}")
    moe = next(site for site in reused if site.kind == "moe")
    assert 0 < moe.recomputed < moe.branches


def test_flops_are_those_that_ran() -> None:
    _, fast = _under(SOME)
    steps = _steps(6, batch=3)
    _run(fast, steps)  # what is computed once is not counted below
    fast.reset()
    fast.reset_stats()
    with flop_counter() as counter:
        _run(fast, steps)
    stats = fast.stats()
    moe = next(site for site in stats.sites if site.kind == "moe")
    assert moe.branches == 4 * 3 * POOL * LOTS and 0 < moe.recomputed < moe.branches
    assert stats.flops_executed == counter.get_total_flops() < stats.flops_uncached


@pytest.mark.parametrize(
    ("policy", "cache_dtype"),
    [
        slow(SOME, None, id="held"),
        pytest.param(SOME, "fp8", id="held-fp8"),
        pytest.param(BranchForecast(order=1, select="error_budget"), "bf16", id="forecast-bf16"),
    ],
)
def test_memory_is_what_was_estimated(policy: Method, cache_dtype: CacheDtype | None) -> None:
    model = market_toy()
    fast = moeca_fx.transform(model, toy_inputs(), policy=policy, cache_dtype=cache_dtype)
    exact = _run(_under(policy)[1], _steps(6))
    rounded = _run(fast, _steps(6))
    estimated = moeca_fx.estimate_memory(model, toy_inputs(), policy=policy, batch=2, cache_dtype=cache_dtype)
    assert estimated == fast.memory()
    states = dict(estimated.states)
    assert states[f"{SITE}.token"] == 2 * POOL * LOTS * 8
    assert states[f"{SITE}.feature"] == 2 * POOL * LOTS * WIDTH * {None: 4, "bf16": 2, "fp8": 1}[cache_dtype]
    limit = {None: 1e-6, "bf16": 0.02, "fp8": 0.1}[cache_dtype]
    for found, expected in zip(rounded, exact, strict=True):
        assert float((found - expected).abs().max()) <= limit * float(expected.abs().max())


def test_the_report_says_who_chooses() -> None:
    report = moeca_fx.inspect(_pair()[0], toy_inputs(), policy=SOME)
    found = {site.path: site for site in report.sites}[SITE]
    assert (found.layout, found.experts, found.top_k) == ("expert", POOL, LOTS)
    assert f"E{POOL} taking {LOTS} tokens each, expert choice" in str(report)
    assert any("storeys.0.mixing before it is not synchronized" in warning for warning in report.warnings)
    assert {site.layout for site in report.sites if site.kind != "moe"} == {None}


# -- other levels, and what is refused ----------------------------------------------------------------------------


def _has_meaning(method: Method) -> bool:
    """A margin keeps a branch for another id, which is another token here; a token selector routes single tokens."""
    rules = method.policy().rules
    by_row = [rule for rule in rules if isinstance(rule, SublayerRule) and rule.selector is not None]
    return not by_row and all(rule.margin is None for rule in rules if isinstance(rule, BranchRule))


SERVED = [method for method in every_method() if _has_meaning(method)]
REFUSED = [method for method in every_method() if not _has_meaning(method)]


@pytest.mark.parametrize("method", SERVED, ids=label)
def test_every_other_method_runs_and_reuses(method: Method) -> None:
    model, fast = _under(method)
    steps = _steps(STEPS, change=0.01)
    found, expected = _run(fast, steps), [model(*step) for step in steps]
    stats = fast.stats()
    assert stats.cached_steps > 0 and stats.flops_executed < stats.flops_uncached
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for have, want in zip(found, expected, strict=True):
        assert float((have - want).abs().max()) <= 0.2 * float(want.abs().max())


@pytest.mark.parametrize("method", REFUSED, ids=label)
def test_rules_without_a_meaning_are_refused_by_name(method: Method) -> None:
    model, plain = _pair()
    named = f"{SITE}: its experts choose .*expected a rule without a (margin|token selector), found"
    with pytest.raises(UnsupportedModelError, match=named):
        plain.with_policy(method)
    with pytest.raises(UnsupportedModelError, match=named):
        moeca_fx.estimate_memory(model, toy_inputs(), policy=method)


def test_both_kinds_of_refusal_are_among_the_methods() -> None:
    assert {method.method for method in REFUSED} == {"toca", "duca", "sublayer_forecast", "branch_forecast"}
    assert {method.method for method in SERVED} >= {"moeca", "fora", "taylorseer", "teacache", "dbcache", "forecast"}


@pytest.mark.parametrize("policy", [None, SOME], ids=["plain", "cached"])
def test_export_is_refused(policy: MoECa | None, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"{SITE} routes by expert choice"):
        to_pt2(_pair()[0], tmp_path / "model", toy_inputs(), policy=policy)


# -- graphs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage() -> Vectorized:
    return vectorized(market_toy(), toy_inputs())


def test_states_are_laid_out_by_expert(stage: Vectorized) -> None:
    states = {state.name: state for state in stage.graphs(SOME).states if state.site == SITE}
    assert {name.rpartition(".")[2]: state.shape for name, state in states.items()} == {
        "token": (POOL, LOTS),
        "weight": (POOL, LOTS),
        "norm": (POOL, LOTS),
        "feature": (POOL, LOTS, WIDTH),
        "activation": (POOL, TOKENS),
        "shared": (TOKENS, WIDTH),
    }
    token = states[f"{SITE}.token"]
    assert isinstance(token, StateSpec) and token.dtype == torch.int64 and token.empty == -1


def test_later_rows_inherit_every_token_with_a_recomputed_branch(stage: Vectorized) -> None:
    graphs = stage.graphs(SOME)
    _, counted = run_steps(graphs, _steps(4, change=0.5))
    kinds = [(counter.site, counter.kind) for counter in graphs.counters]
    for step in counted:
        by_kind = dict(zip(kinds, step.tolist(), strict=True))
        rows = by_kind[SITE, "shared_rows"]
        assert rows == by_kind["storeys.1.layer", "ffn_rows"] == by_kind["storeys.1.mixing", "attention_rows"]
        recomputed = by_kind[SITE, "recomputed"]
        assert 0 < rows <= min(recomputed, 2 * TOKENS) and rows >= recomputed / POOL
    assert len({int(step.sum()) for step in counted}) > 1
