"""Sites whose tokens may have fewer experts than slots: equal to the model and to the slow reference, and cheaper."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.discover import discover
from moeca_fx.errors import ExportError
from moeca_fx.export import to_pt2
from moeca_fx.kernels.cpu import ops as cpu
from moeca_fx.kernels.families import CPU
from moeca_fx.passes.lower_kernels import lower_kernels
from moeca_fx.policies import Method, build
from moeca_fx.policies.methods.branch_forecast import BranchForecast
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold
from moeca_fx.runtime.flops import flop_counter
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.compiled import vectorized
from tests.helpers.passes import staged
from tests.helpers.sparse_toys import MOST, Thrifty
from tests.helpers.toys import POOL, TOKENS, WIDTH, Blend, Toy, toy, toy_inputs
from tests.policies.comparison import MARGIN, assert_close
from tests.reference import moe_site, sparse_site
from tests.reference.sparse_site import Slots

SITE = "storeys.0.layer"


@cache
def _pair(height: int = 2) -> tuple[Toy, TransformedModel]:
    model = toy(partial(Thrifty, garbage=True), height=height).double()
    return model, moeca_fx.transform(model, _inputs(toy_inputs()), policy=None)


def _inputs(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return inputs[0].double(), inputs[1].double()


def _steps(count: int, batch: int = 2, change: float = 0.15) -> list[tuple[Tensor, Tensor]]:
    grid, _ = toy_inputs(batch)
    noise = torch.randn(count, *grid.shape, generator=torch.Generator().manual_seed(1)).cumsum(0)
    return [_inputs((grid + change * noise[s], torch.full((batch,), 0.1 + 0.05 * s))) for s in range(count)]


def _run(fast: TransformedModel, steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [fast(*step).clone() for step in steps]


def test_only_sites_with_empty_slots_are_marked() -> None:
    (found,) = discover(toy(Thrifty), toy_inputs(), {}).regions
    (dense,) = discover(toy(partial(Thrifty, floor=0.0)), toy_inputs(), {}).regions
    assert found.empty_slots and not dense.empty_slots
    for model, empty in ((toy(Thrifty), True), (toy(partial(Thrifty, floor=0.0)), True), (toy(Blend), False)):
        (site,) = staged(model, toy_inputs()).sites.moe  # a floor that the probe never met may be met later
        assert site.empty_slots == empty
    report = moeca_fx.inspect(toy(Thrifty), toy_inputs())
    assert {site.path: site.empty_slots for site in report.sites} == {SITE: True, "storeys.0.mixing": False}
    assert f"E{POOL} up to top-{MOST}" in str(report)
    assert {site.path: site.action for site in report.sites}["storeys.0.mixing"] == "synchronized"


@pytest.mark.parametrize("batch", [1, 4])
def test_without_a_policy_it_is_the_model_whatever_the_weights_of_empty_slots(batch: int) -> None:
    model, fast = _pair()
    for inputs in _steps(3, batch):
        assert_close(fast(*inputs), model(*inputs), "output")


@pytest.mark.parametrize("attention", ["synchronized", "full"])
def test_everything_recomputed_is_the_model(attention: str) -> None:
    model, plain = _pair()
    fast = plain.with_policy(MoECa(tau0=0.0, attention=attention))
    for found, inputs in zip(_run(fast, _steps(5)), _steps(5), strict=True):
        assert_close(found, model(*inputs), "output")
    stats = fast.stats()
    assert 0 < stats.recomputed_branches == stats.branches < 4 * 2 * 2 * TOKENS * MOST


class _Reference:
    """The toy of one storey under a branch rule with full attention, token by token."""

    def __init__(self, model: Toy, rule: BranchRule, batch: int) -> None:
        self.model, self.rule = model, rule
        self.slots: list[list[Slots]] = [[[None] * MOST for _ in range(TOKENS)] for _ in range(batch)]
        self.activation = [[[0.0] * TOKENS for _ in range(POOL)] for _ in range(batch)]
        self.counts = [0, 0, 0]  # branches, matched, recomputed
        self.margin = 1.0

    def step(self, grid: Tensor, clock: Tensor, full: bool) -> Tensor:
        storey = self.model.storeys[0]
        phase = clock[:, None] * self.model.pitch
        first, second = storey.valves(torch.cat([phase.sin(), phase.cos()], -1)).unsqueeze(1).chunk(2, -1)
        tokens = grid + first * storey.mixing(storey.level(grid))
        rows = storey.level(tokens)
        out = torch.stack([self._sample(b, rows[b], full) for b in range(len(grid))])
        return tokens + second * (out + storey.layer.constant(rows))

    def _sample(self, b: int, rows: Tensor, full: bool) -> Tensor:
        selector, layer = self.rule.selector, self.model.storeys[0].layer
        ids, weights = layer.choose(rows)
        tau = [0.0] * POOL
        if isinstance(selector, ScoreThreshold):
            self.activation[b] = moe_site.update_activation(self.activation[b], ids.tolist(), selector.beta)
            tau = moe_site.thresholds(self.activation[b], selector.tau0, selector.alpha, selector.entropy_norm)
        out = []
        for t in range(TOKENS):
            slots = self.slots[b][t]
            found = sparse_site.branches(ids[t].tolist(), weights[t].tolist(), POOL, selector.score_weight)
            if full:
                slots[:] = [None] * MOST
            held = {slot.expert for slot in slots if slot is not None}
            decision, margins = sparse_site.decide(found, slots, tau, self.rule)
            self.margin = min([self.margin, *margins])
            if not full:
                matched = sum(branch.expert in held for branch in found)
                self.counts = [
                    n + m for n, m in zip(self.counts, (len(found), matched, sum(decision.values())), strict=True)
                ]
            computed = {x.place: layer.quarry.stones[x.expert](rows[t]) for x in found if decision[x.place]}
            sparse_site.update(found, slots, computed)
            out.append(sparse_site.combine(found, slots, torch.zeros(WIDTH, dtype=rows.dtype)))
        return torch.stack(out)


@pytest.mark.parametrize(
    "method",
    [
        MoECa(attention="full", shared_expert="full", tau0=0.5),
        MoECa(attention="full", shared_expert="full", tau0=0.4, score_weight="raw", entropy_norm="minmax", interval=5),
        BranchForecast(order=0, select="none", attention="full"),
    ],
    ids=["share", "raw", "unmatched"],
)
def test_every_step_equals_the_reference(method: Method) -> None:
    model, _ = _pair(height=1)
    (rule,) = method.policy().rules
    assert isinstance(rule, BranchRule)
    fast = moeca_fx.transform(
        model,
        _inputs(toy_inputs()),
        policy=moeca_fx.policies.Policy(
            method.policy().schedule, (BranchRule(selector=rule.selector, attention="full", shared_expert="full"),)
        ),
    )
    reference = _Reference(model, rule, batch=2)
    lost = 0
    for step, inputs in enumerate(_steps(9)):
        before = fast.stats().full_steps
        with torch.no_grad():
            found = fast(*inputs)
            expected = reference.step(*inputs, full=fast.stats().full_steps > before)
        assert_close(found, expected, f"step {step}")
        expert, feature = fast.cache()[f"{SITE}.expert"], fast.cache()[f"{SITE}.feature"]
        for b, t, q in ((b, t, q) for b in range(2) for t in range(TOKENS) for q in range(MOST)):
            slot = reference.slots[b][t][q]
            assert int(expert[b, t, q]) == (POOL if slot is None else slot.expert)
            wanted = torch.zeros(WIDTH, dtype=torch.float64) if slot is None else slot.feature
            torch.testing.assert_close(feature[b, t, q], wanted)
            lost += slot is None
    assert reference.margin > MARGIN and lost > 0
    (site,) = [site for site in fast.stats().sites if site.kind == "moe"]
    assert [site.branches, site.matched, site.recomputed] == reference.counts
    assert 0 < site.recomputed < site.branches and site.matched < site.branches


@pytest.mark.parametrize(
    "policy",
    [
        MoECa(tau0=0.5),
        BranchForecast(order=1, select="error_budget"),
        BranchForecast(order=0, margin=0.05),
        build("sublayer_forecast", share=0.3),
        build("dbcache", threshold=0.5),
        build("fora"),
    ],
    ids=lambda policy: policy.method + str(policy.as_dict().get("order", "")),
)
def test_flops_are_those_that_ran(policy: Method) -> None:
    model, plain = _pair()
    fast = plain.with_policy(policy)
    steps = _steps(7, change=0.02)
    _run(fast, steps)  # what is computed once is not counted below
    fast.reset()
    fast.reset_stats()
    with flop_counter() as counter:
        found = _run(fast, steps)
    stats = fast.stats()
    assert stats.cached_steps > 0
    if policy.method == "dbcache":  # its probe counts nothing: it runs the first storey as if no slot were empty
        assert counter.get_total_flops() < stats.flops_executed < stats.flops_uncached
    else:
        assert stats.flops_executed == counter.get_total_flops() < stats.flops_uncached
    for have, inputs in zip(found, steps, strict=True):
        want = model(*inputs)
        assert float((have - want).abs().max()) <= 0.2 * float(want.abs().max())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    _, plain = _pair()
    fast = plain.with_policy(MoECa(tau0=0.5))
    steps = _steps(6, batch=3)
    together = _run(fast, steps)
    for b in range(3):
        fast.reset()
        for found, expected in zip(_run(fast, [(g[b : b + 1], c[b : b + 1]) for g, c in steps]), together, strict=True):
            torch.testing.assert_close(found[0], expected[b])


@pytest.mark.skipif(not cpu.available(), reason="there is no C++ compiler to build the CPU kernels")
def test_of_the_kernels_only_those_that_skip_empty_slots_are_used() -> None:
    stage = vectorized(toy(Thrifty), toy_inputs())
    graphs = stage.graphs(MoECa(tau0=0.5))
    full, cached = lower_kernels(graphs.full, CPU).count, lower_kernels(graphs.cached, CPU).count
    assert full["grouped"] == 1 and cached["recompute"] == 1
    assert not {"branches", "decide", "threshold", "update_activation"} & (full.keys() | cached.keys())


def test_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"tokens of {SITE} may have fewer than {MOST} experts"):
        to_pt2(toy(Thrifty), tmp_path / "model", toy_inputs(), policy=None)
