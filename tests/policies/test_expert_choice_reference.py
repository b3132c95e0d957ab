"""Cached steps of a model whose experts choose their tokens equal the slow reference: outputs and every cache."""

from collections.abc import Iterator
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import moeca_fx
from moeca_fx import MoECa
from moeca_fx.policies import Method
from moeca_fx.policies.methods.branch_forecast import BranchForecast
from moeca_fx.policies.rules import BranchRule
from moeca_fx.runtime.module import TransformedModel
from tests.helpers.expert_choice_toys import Market, market_toy
from tests.helpers.grids import slow
from tests.helpers.toys import Toy, Wedge, toy_inputs
from tests.policies.comparison import MARGIN, assert_close
from tests.reference.expert_choice_site import History
from tests.reference.expert_choice_toy import Counts, ReferenceToy

STEPS = 10
KINDS = {"mixing": ("attn", "key", "value")}


@cache
def _models() -> tuple[Toy, TransformedModel]:
    """Market, dense, and a market of another form; random gates are far from zero."""
    model = market_toy(Market, Wedge, height=2)
    last = market_toy(partial(Market, constant=None, flat=True, fair=True, lots=4), height=1, seed=1)
    model.storeys.extend(last.storeys)
    model = model.double()
    return model, moeca_fx.transform(model, next(_trajectory(2)), policy=None)


def _trajectory(batch: int, drift: float = 0.15, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample drifts at its own speed, so that the samples of a batch decide differently."""
    grid = toy_inputs(batch, seed)[0].double()
    generator = torch.Generator().manual_seed(seed)
    speed = torch.linspace(0.5, 1.5, batch, dtype=torch.float64)[:, None, None]
    for step in range(STEPS):
        yield grid.clone(), torch.full((batch,), 0.1 + 0.03 * step, dtype=torch.float64)
        grid = grid + drift * speed * torch.randn(grid.shape, generator=generator, dtype=torch.float64)


def _run_both(method: Method, batch: int = 2, drift: float = 0.15, seed: int = 0) -> list[Counts]:
    model, plain = _models()
    fast, policy = plain.with_policy(method), method.policy()
    (rule,) = policy.rules
    assert isinstance(rule, BranchRule)
    reference = ReferenceToy(model, rule)
    for step, inputs in enumerate(_trajectory(batch, drift, seed)):
        before = fast.stats().full_steps
        with torch.no_grad():
            found = fast(*inputs)
            full = fast.stats().full_steps > before
            expected = reference.step(*inputs, full=full)
            assert_close(found, expected, f"step {step}: output")
            if full:
                assert_close(expected, model(*inputs), f"step {step}: the reference's full step")
        _compare_states(fast.cache(), reference, f"step {step}")
    assert reference.margin > MARGIN, "a score comes too close to its threshold to compare; use another seed"
    _compare_counts(fast, reference.counts)
    return reference.counts


def _compare_states(cache: dict[str, Tensor], reference: ReferenceToy, where: str) -> None:
    assert {name.rpartition(".")[2] for name in cache} >= {"token", "weight", "feature"}
    for name, value in cache.items():
        _, storey, layer, kind = name.split(".")
        samples = [_state(sample[int(storey)], layer, kind) for sample in reference.samples]
        expected = torch.stack(samples)
        if kind == "token":
            assert torch.equal(value, expected), f"{where}: {name}"
        else:
            assert_close(value.double(), expected.double(), f"{where}: {name}")


def _state(state: object, layer: str, kind: str) -> Tensor:
    """One sample's tensor of a kind, e.g. ``feature_1``."""
    from tests.reference.expert_choice_toy import State

    assert isinstance(state, State)
    base, _, age = kind.partition("_")
    older = int(age or 0)

    def stacked(histories: list[History]) -> Tensor:
        return torch.stack([history.values[older] for history in histories])

    slots = state.site.slots
    if layer == "mixing":
        held = {"key": state.key, "value": state.value}
        return torch.stack(held[base]) if base in held else stacked(state.attn)
    if base == "feature":
        return torch.stack([stacked([slot.feature for slot in row]) for row in slots])
    if base in ("token", "weight", "norm", "error"):
        return torch.tensor([[getattr(slot, base) for slot in row] for row in slots])
    if base == "activation":
        return torch.tensor(state.site.activation)
    return stacked({"ffn": state.ffn, "shared": state.site.shared}[base])


def _compare_counts(fast: TransformedModel, expected: list[Counts]) -> None:
    for site in fast.stats().sites:
        counts = expected[int(site.path.split(".")[1])]
        if site.kind == "moe":
            have = (site.branches, site.matched, site.recomputed)
            assert have == (counts.branches, counts.matched, counts.recomputed), site.path
            assert site.rows_recomputed == counts.shared_rows, site.path
        else:
            rows = counts.attention_rows if site.kind == "attention" else counts.ffn_rows
            assert site.rows_recomputed == rows, site.path


METHODS = [
    MoECa(),
    slow(MoECa(attention="reuse", shared_expert="reuse", entropy_norm="minmax", interval=5)),
    MoECa(attention="full", dense_ffn="reuse", score_weight="raw", tau0=0.45),
    slow(MoECa(dense_ffn="full", shared_expert="full", tau0=1.2, lambda1=3.0)),
    slow(BranchForecast(order=0, select="score_budget", share=0.25)),
    slow(BranchForecast(order=1, select="none", attention="reuse")),
    BranchForecast(order=1, select="score"),
    BranchForecast(order=1, select="error_budget", share=0.3),
    BranchForecast(order=2, select="score_budget", share=0.2, warmup=3),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_step_equals_the_reference(method: Method) -> None:
    counts = [count for count in _run_both(method) if count.branches]
    assert len(counts) == 2
    for count in counts:
        assert 0 < count.recomputed < count.branches
        assert count.matched < count.branches, "some tokens are new to an expert"


def test_everything_recomputed() -> None:
    counts = [count for count in _run_both(MoECa(tau0=0.0), batch=3, seed=4) if count.branches]
    assert all(count.recomputed == count.branches > 0 for count in counts)


def test_nothing_recomputed() -> None:
    counts = _run_both(MoECa(tau0=50.0, attention="reuse"), drift=1e-6)
    assert sum(count.branches for count in counts) > 0
    assert sum(c.recomputed + c.attention_rows + c.ffn_rows + c.shared_rows for c in counts) == 0
