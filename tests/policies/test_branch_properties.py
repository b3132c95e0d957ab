"""Property-based tests of the branch functions: slots, scores, thresholds, branch plan and grouped linear.

Properties are stated over whole batches; "equals the reference" means the plain loops of `tests.reference`.
"""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_fx.ops import branch_plan, grouped_linear
from moeca_fx.policies.branch import (
    EntropyNorm,
    ScoreWeight,
    branch_score,
    decide,
    expert_threshold,
    match_branches,
    routing_share,
    update_activation,
)
from tests.reference import moe_site

settings.register_profile("branch", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("branch")


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Two routings of one batch, (now [B, T, k], cached [B, T, k], E); a token's experts differ."""
    num_experts = draw(st.integers(1, 8))
    k = draw(st.integers(1, min(num_experts, 4)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)))
    tokens = shape[0] * shape[1]
    orders = st.lists(st.permutations(range(num_experts)), min_size=tokens, max_size=tokens)
    now = torch.tensor([order[:k] for order in draw(orders)]).reshape(*shape, k)
    cached = torch.tensor([order[:k] for order in draw(orders)]).reshape(*shape, k)
    return now, cached, num_experts


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01


seeds = st.integers(0, 2**31 - 1)


@given(routings())
def test_slots_are_a_permutation(case: tuple[Tensor, Tensor, int]) -> None:
    now, cached, _ = case
    slot, _ = match_branches(now, cached)
    assert torch.equal(slot.sort(dim=-1).values, torch.arange(now.shape[-1]).expand_as(now))


@given(routings())
def test_matched_branches_keep_their_slot_and_their_feature(case: tuple[Tensor, Tensor, int]) -> None:
    now, cached, _ = case
    slot, matched = match_branches(now, cached)
    held = cached.gather(-1, slot)  # the expert that the assigned slot held before the update
    assert torch.equal(matched, held == now)
    # writing only the unmatched branches leaves every matched slot with its expert and its feature row
    updated = cached.scatter(-1, slot, now)
    kept = torch.zeros_like(matched).scatter(-1, slot, matched)
    assert torch.equal(updated[kept], cached[kept])


@given(routings())
def test_unmatched_branches_take_the_freed_slots_in_order(case: tuple[Tensor, Tensor, int]) -> None:
    now, cached, _ = case
    slot, matched = match_branches(now, cached)
    for b in range(now.shape[0]):
        for i in range(now.shape[1]):
            leaving = [q for q, e in enumerate(cached[b, i].tolist()) if e not in now[b, i].tolist()]
            assert slot[b, i][~matched[b, i]].tolist() == leaving


@given(routings())
def test_matching_equals_the_reference(case: tuple[Tensor, Tensor, int]) -> None:
    now, cached, _ = case
    slot, matched = match_branches(now, cached)
    for b in range(now.shape[0]):
        for i in range(now.shape[1]):
            new, old = now[b, i].tolist(), cached[b, i].tolist()
            assert slot[b, i].tolist() == moe_site.assign_slots(new, old)
            assert matched[b, i].tolist() == [q is not None for q in moe_site.match(new, old)]


@given(routings())
def test_matching_a_sample_alone_equals_the_sample_in_a_batch(case: tuple[Tensor, Tensor, int]) -> None:
    now, cached, _ = case
    slot, matched = match_branches(now, cached)
    for b in range(now.shape[0]):
        alone_slot, alone_matched = match_branches(now[b : b + 1], cached[b : b + 1])
        assert torch.equal(alone_slot[0], slot[b])
        assert torch.equal(alone_matched[0], matched[b])


@given(routings(), seeds, st.floats(0, 3), st.floats(0, 3))
def test_share_and_score_equal_the_reference(
    case: tuple[Tensor, Tensor, int], seed: int, lambda1: float, lambda2: float
) -> None:
    weight = _random(tuple(case[0].shape), seed)
    then = _random(tuple(case[0].shape), seed + 1)
    norm = _random(tuple(case[0].shape), seed + 2)
    now = routing_share(weight)
    scores = branch_score(now, then, norm, lambda1, lambda2)
    for b in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            values = moe_site.share(weight[b, i].tolist())
            contributed = moe_site.contribution([value.reshape(1) for value in norm[b, i]])
            expected = [
                moe_site.score(v, v0, o, lambda1, lambda2)
                for v, v0, o in zip(values, then[b, i].tolist(), contributed, strict=True)
            ]
            torch.testing.assert_close(now[b, i].double(), torch.tensor(values).double(), rtol=1e-6, atol=1e-7)
            found = scores[b, i].double()
            torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)


def test_a_score_equal_to_the_threshold_is_reused() -> None:
    now, one = torch.tensor([[[3]]]), torch.ones(1, 1, 1)
    for tau, code in ((1.5, 0), (1.4999, 1)):  # 1.0 + 1.1 * 0 + 0.5 * 1
        threshold = torch.full((1, 4), tau)
        assert decide(now, one, now, one, one, threshold, 1.1, 0.5, "raw")[3].item() == code


@given(seeds)
def test_a_token_of_zero_features_has_no_contribution(seed: int) -> None:
    weight = _random((2, 3, 2), seed)
    scores = branch_score(weight, weight, torch.zeros(2, 3, 2, dtype=torch.float64), 1.1, 0.6)
    assert torch.equal(scores.double(), weight)


@given(routings(), seeds, st.floats(0, 0.99))
def test_activation_equals_the_reference(case: tuple[Tensor, Tensor, int], seed: int, beta: float) -> None:
    now, _, num_experts = case
    before = _random((now.shape[0], num_experts, now.shape[1]), seed).float()
    after = update_activation(before, now, beta)
    assert after.dtype == torch.float32
    for b in range(now.shape[0]):
        expected = moe_site.update_activation(before[b].tolist(), now[b].tolist(), beta)
        torch.testing.assert_close(after[b].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    """Activation maps [B, E, T] as moving averages of 0/1 give them; some experts were never selected."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    values = st.one_of(st.just(0.0), st.floats(1 / 64, 1.0, width=32))
    count = shape[0] * shape[1] * shape[2]
    return torch.tensor(draw(st.lists(values, min_size=count, max_size=count))).reshape(shape)


norms: st.SearchStrategy[EntropyNorm] = st.sampled_from(["minmax", "log"])


@given(activations(), st.floats(0, 3), st.floats(0, 0.99), norms)
def test_thresholds_stay_within_alpha_of_tau0(activation: Tensor, tau0: float, alpha: float, norm: EntropyNorm) -> None:
    tau = expert_threshold(activation, tau0, alpha, norm)
    assert tau.shape == activation.shape[:2]
    assert bool(torch.isfinite(tau).all())
    slack = 1e-5 * tau0 + 1e-30
    assert bool((tau >= tau0 * (1 - alpha) - slack).all())
    assert bool((tau <= tau0 * (1 + alpha) + slack).all())


@given(activations(), st.floats(0.01, 3), st.floats(0, 0.99), norms)
def test_thresholds_equal_the_reference(activation: Tensor, tau0: float, alpha: float, norm: EntropyNorm) -> None:
    tau = expert_threshold(activation, tau0, alpha, norm)
    for b, maps in enumerate(activation.double().tolist()):
        entropies = [moe_site.entropy(row) for row in maps]
        spread = max(entropies) - min(entropies)
        assume(norm == "log" or spread == 0.0 or spread > 0.01)  # min-max blows up the rounding of a tiny spread
        expected = torch.tensor(moe_site.thresholds(maps, tau0, alpha, norm), dtype=torch.float64)
        torch.testing.assert_close(tau[b].double(), expected, rtol=1e-3 * tau0, atol=1e-4 * tau0)


@given(activations(), norms)
def test_thresholds_of_a_sample_do_not_depend_on_its_batch(activation: Tensor, norm: EntropyNorm) -> None:
    tau = expert_threshold(activation, 0.8, 0.6, norm)
    for b in range(activation.shape[0]):
        assert torch.equal(expert_threshold(activation[b : b + 1], 0.8, 0.6, norm)[0], tau[b])


@given(st.lists(st.integers(0, 5), max_size=30))
def test_plan_is_a_stable_sort_with_cumulative_counts(ids: list[int]) -> None:
    num_experts = 6
    order, offsets = branch_plan(torch.tensor(ids, dtype=torch.int64), num_experts)
    assert order.tolist() == sorted(range(len(ids)), key=lambda m: ids[m])
    ends, total = [], 0
    for e in range(num_experts):
        total += ids.count(e)
        ends.append(total)
    assert offsets.tolist() == ends


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), seeds, st.booleans())
def test_grouped_linear_equals_one_linear_per_row(ids: list[int], seed: int, with_bias: bool) -> None:
    num_experts, width, out = 5, 3, 4
    weight = _random((num_experts, out, width), seed)
    bias = _random((num_experts, out), seed + 1) if with_bias else None
    rows = _random((len(ids), width), seed + 2)
    order, offsets = branch_plan(torch.tensor(ids, dtype=torch.int64), num_experts)
    grouped = grouped_linear(rows[order], weight, bias, offsets)
    assert grouped.shape == (len(ids), out)
    for position, m in enumerate(order.tolist()):
        expected = weight[ids[m]] @ rows[m]
        if bias is not None:
            expected = expected + bias[ids[m]]
        torch.testing.assert_close(grouped[position], expected, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_grouped_linear_of_no_rows_is_empty(seed: int) -> None:
    weight = _random((3, 2, 4), seed)
    result = grouped_linear(torch.zeros(0, 4, dtype=torch.float64), weight, None, torch.zeros(3, dtype=torch.int64))
    assert result.shape == (0, 2)


@given(
    routings(),
    seeds,
    st.floats(0, 1.5, width=32),
    st.sampled_from(["share", "raw"]),
)
def test_decision_equals_the_reference(
    case: tuple[Tensor, Tensor, int], seed: int, tau0: float, kind: ScoreWeight
) -> None:
    """Codes in slot order: 0 reused, 1 matched and over the threshold, 2 unmatched."""
    now, cached, num_experts = case
    shape = tuple(now.shape)
    weight, then, norm = _random(shape, seed), _random(shape, seed + 1), _random(shape, seed + 2)
    threshold = tau0 * 2 * _random((shape[0], num_experts), seed + 3)
    slot, held, value, code = decide(now, weight, cached, then, norm, threshold, 1.1, 0.6, kind)
    for b in range(shape[0]):
        for i in range(shape[1]):
            experts, old = now[b, i].tolist(), cached[b, i].tolist()
            slots = [
                moe_site.Slot(e, w, h.reshape(1)) for e, w, h in zip(old, then[b, i].tolist(), norm[b, i], strict=True)
            ]
            values = moe_site.score_values(weight[b, i].tolist(), kind)
            scores = moe_site.branch_scores(experts, values, slots, 1.1, 0.6)
            again = moe_site.decide(experts, scores, threshold[b].tolist())
            for p, q in enumerate(moe_site.assign_slots(experts, old)):
                assert slot[b, i, p] == q
                assert held[b, i, q] == experts[p]
                assert abs(float(value[b, i, q]) - values[p]) < 1e-6
                expected = 2 if experts[p] not in old else int(again[p])
                assert code[b, i, q] == expected
