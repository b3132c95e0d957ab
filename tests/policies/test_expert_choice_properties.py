"""Properties of the decisions where experts choose their tokens; "the reference" means `tests.reference`'s loops."""

from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_fx.policies.branch import ScoreWeight
from moeca_fx.policies.expert_choice import (
    align_token_features,
    decide_picked_tokens,
    decide_tokens,
    match_tokens,
    rank_tokens_by_score,
    token_share,
    update_chosen,
)
from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold
from tests.helpers.choices import choices, numbers
from tests.reference import expert_choice_site, moe_site
from tests.reference.expert_choice_site import History, Site, Slot

settings.register_profile("choice", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("choice")

Case = tuple[Tensor, Tensor, int]
seeds = st.integers(0, 2**31 - 1)


@given(choices())
def test_matching_equals_the_reference(case: Case) -> None:
    now, cached, tokens = case
    slot, matched = match_tokens(now, cached, tokens)
    for b in range(now.shape[0]):
        for e in range(now.shape[1]):
            row, held = now[b, e].tolist(), cached[b, e].tolist()
            assert slot[b, e].tolist() == moe_site.assign_slots(row, held)
            assert matched[b, e].tolist() == [q is not None for q in moe_site.match(row, held)]


@given(choices())
def test_nothing_matches_a_cache_that_was_never_filled(case: Case) -> None:
    now, _, tokens = case
    slot, matched = match_tokens(now, torch.full_like(now, -1), tokens)
    assert not matched.any()
    assert torch.equal(slot, torch.arange(now.shape[-1]).expand_as(now))
    weight, threshold = numbers(now, 0), torch.full(now.shape[:2], 9.0)
    *_, code = decide_tokens(
        now, weight, torch.full_like(now, -1), weight, weight, threshold, tokens, 1.0, 1.0, "share"
    )
    assert bool((code == 2).all())


@given(choices(), seeds)
def test_shares_of_a_token_sum_to_one(case: Case, seed: int) -> None:
    now, _, tokens = case
    share = token_share(numbers(now, seed), now, tokens)
    sums = torch.zeros(now.shape[0], tokens, dtype=torch.float64).scatter_add(1, now.flatten(1), share.flatten(1))
    chosen = torch.zeros_like(sums).scatter(1, now.flatten(1), 1.0)
    torch.testing.assert_close(sums, chosen)
    assert torch.equal(token_share(torch.zeros_like(share), now, tokens), torch.zeros_like(share))


@given(choices(), seeds, st.sampled_from(["share", "raw"]))
def test_decisions_and_ranks_equal_the_reference(case: Case, seed: int, kind: ScoreWeight) -> None:
    now, cached, tokens = case
    weight, then, norm = (numbers(now, seed + index) for index in range(3))
    rule = BranchRule(selector=ScoreThreshold(tau0=0.6, score_weight=kind, beta=0.5))
    assert isinstance(rule.selector, ScoreThreshold)
    activation = update_chosen(torch.zeros(*now.shape[:2], tokens, dtype=torch.float64), now, 0.5)
    threshold = numbers(now[..., 0], seed + 3)
    options = (rule.selector.lambda1, rule.selector.lambda2, kind)
    arguments = (now, weight, cached, then, norm)
    slot, token, slot_weight, code = decide_tokens(*arguments, threshold, tokens, *options)
    rank = rank_tokens_by_score(*arguments, tokens, *options)
    for b in range(now.shape[0]):
        site = Site(
            [
                [
                    Slot(*(float(p) if i else int(p) for i, p in enumerate(s)), History([]))
                    for s in zip(*row, strict=True)
                ]
                for row in zip(cached[b].tolist(), then[b].tolist(), norm[b].tolist(), strict=True)
            ]
        )
        expert_choice_site.update_activation(site, now[b].tolist(), tokens, 0.5)
        torch.testing.assert_close(activation[b], torch.tensor(site.activation, dtype=torch.float64))
        scores = expert_choice_site.scores(site, (now[b].tolist(), weight[b].tolist()), tokens, rule)
        for e, row in enumerate(scores):
            assume(all(s is None or abs(s - float(threshold[b, e])) > 1e-9 for s in row))
            expected = [2 if s is None else int(s > float(threshold[b, e])) for s in row]
            places = slot[b, e].tolist()
            assert [int(code[b, e, q]) for q in places] == expected
            assert [int(token[b, e, q]) for q in places] == now[b, e].tolist()
            wanted = [-torch.inf if s is None else s for s in row]
            torch.testing.assert_close(rank[b, e][slot[b, e]], torch.tensor(wanted, dtype=torch.float64))
    values = weight if kind == "raw" else token_share(weight, now, tokens)
    torch.testing.assert_close(slot_weight.gather(2, slot), values)


@given(choices(), seeds)
def test_picked_slots_are_recomputed_where_they_match(case: Case, seed: int) -> None:
    now, cached, tokens = case
    picked = numbers(now, seed) > 0.5
    _, token, _, code = decide_picked_tokens(now, numbers(now, seed), cached, picked, tokens, "share")
    assert torch.equal(code == 2, token != cached)
    assert torch.equal(code[token == cached] == 1, picked[token == cached])


@given(choices(), seeds)
def test_earlier_features_follow_their_tokens(case: Case, seed: int) -> None:
    now, before, tokens = case
    feature, kept = (numbers(now.unsqueeze(-1).expand(*now.shape, 2), seed + index) for index in range(2))
    found = align_token_features(now, before, feature, kept, tokens)
    for place in ((b, e, c) for b in range(now.shape[0]) for e in range(now.shape[1]) for c in range(now.shape[2])):
        b, e, _ = place
        held = before[b, e].tolist()
        token = int(now[place])
        expected = kept[b, e, held.index(token)] if token in held else feature[place]
        assert torch.equal(found[place], expected)


class _Largest(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_memory_grows_with_experts_times_tokens() -> None:
    batch, experts, tokens, capacity = 2, 3, 600, 300
    generator = torch.Generator().manual_seed(0)
    now, cached = (
        torch.rand(batch, experts, tokens, generator=generator).argsort(-1)[..., :capacity] for _ in range(2)
    )
    weight = torch.rand(now.shape, generator=generator)
    with _Largest() as seen:
        decide_tokens(now, weight, cached, weight, weight, torch.ones(batch, experts), tokens, 1.0, 1.0, "share")
    assert 0 < seen.numel <= batch * experts * (tokens + 1)
