"""A branch rule over a whole toy with expert choice (`tests.helpers.expert_choice_toys`), sample by sample.

Storeys with a `Market` run their attention in full or hold it; the others follow the tokens refreshed before them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeca_fx.policies.rules import BranchRule
from moeca_fx.policies.selector import ScoreThreshold
from tests.helpers.expert_choice_toys import Market
from tests.helpers.toys import HEADS, WIDTH, Storey, Toy
from tests.reference import expert_choice_site as sites
from tests.reference.expert_choice_site import History, Site


@dataclass
class Counts:
    """What the cached steps did at one storey."""

    branches: int = 0
    matched: int = 0
    recomputed: int = 0
    shared_rows: int = 0
    attention_rows: int = 0
    ffn_rows: int = 0


@dataclass
class State:
    """The cache of one storey for one sample."""

    attn: list[History] = field(default_factory=list)  # [T]
    key: list[Tensor] = field(default_factory=list)  # [T] of [h, d]
    value: list[Tensor] = field(default_factory=list)
    ffn: list[History] = field(default_factory=list)  # [T]; dense storeys
    site: Site = field(default_factory=Site)


class ReferenceToy:
    """One call of `step` a denoising step; the first must be full.

    Args:
        model: a toy whose layers are `Market` or dense; read only.
        rule: what a cached step does.
    """

    def __init__(self, model: Toy, rule: BranchRule) -> None:
        self.model, self.rule = model, rule
        self.samples: list[list[State]] = []
        self.counts = [Counts() for _ in model.storeys]
        self.full_steps: list[int] = []
        self.index = -1
        self.margin = math.inf

    def step(self, grid: Tensor, clock: Tensor, full: bool) -> Tensor:
        """[B, T, WIDTH] -> [B, T, WIDTH]."""
        self.index += 1
        if not self.samples:
            self.samples = [[State() for _ in self.model.storeys] for _ in grid]
        known = self.full_steps or [self.index]
        self.weights: Sequence[float] = self.rule.predictor.weights(self.index, known)
        out = [self._sample(states, *inputs, full) for states, *inputs in zip(self.samples, grid, clock, strict=True)]
        if full:
            self.full_steps.insert(0, self.index)
        return torch.stack(out)

    def _sample(self, states: list[State], tokens: Tensor, clock: Tensor, full: bool) -> Tensor:
        phase = clock * self.model.pitch
        mood = torch.cat([phase.sin(), phase.cos()])
        inherited: list[int] | None = None
        for storey, state, counts in zip(self.model.storeys, states, self.counts, strict=True):
            assert isinstance(storey, Storey)
            first, second = storey.valves(mood).chunk(2)
            market = isinstance(storey.layer, Market)
            rows = self._attention_rows(market, inherited, len(tokens))
            tokens = tokens + first * self._attention(storey, state, storey.level(tokens), rows, full, counts)
            inputs = storey.level(tokens)
            if market:
                out, inherited = self._market(storey.layer, state.site, inputs, full, counts)
            else:
                out = self._dense(storey.layer, state, inputs, self._ffn_rows(inherited, len(tokens)), full, counts)
            tokens = tokens + second * out
        return tokens

    def _ffn_rows(self, inherited: list[int] | None, tokens: int) -> list[int]:
        return {"inherit": inherited or [], "reuse": [], "full": list(range(tokens))}[self.rule.dense_ffn]

    def _attention_rows(self, market: bool, inherited: list[int] | None, tokens: int) -> list[int]:
        if self.rule.attention == "synchronized":
            return list(range(tokens)) if market else self._ffn_rows(inherited, tokens)
        return list(range(tokens)) if self.rule.attention == "full" else []

    def _attention(
        self, storey: Storey, state: State, inputs: Tensor, rows: list[int], full: bool, counts: Counts
    ) -> Tensor:
        mixing, each = storey.mixing, WIDTH // HEADS
        everyone = range(len(inputs))
        wanted = list(everyone) if full else rows
        counts.attention_rows += 0 if full else len(wanted)
        if not state.key:
            state.key, state.value = ([torch.empty(0)] * len(inputs) for _ in range(2))
        for i in wanted:
            state.key[i], state.value[i] = mixing.keep(inputs[i]).view(2, HEADS, each)
        out = [history.guess(self.weights) for history in state.attn] if not full else [torch.empty(0)] * len(inputs)
        for i in wanted:
            query, parts = mixing.ask(inputs[i]).view(HEADS, each), []
            for h in range(HEADS):
                scores = torch.stack([query[h] @ state.key[j][h] for j in everyone]) / math.sqrt(each)
                parts.append(scores.softmax(0) @ torch.stack([state.value[j][h] for j in everyone]))
            out[i] = mixing.back(torch.cat(parts))
        self._keep(state.attn, out, wanted, full)
        return torch.stack(out)

    def _keep(self, held: list[History], fresh: list[Tensor], rows: list[int], full: bool) -> None:
        """Store after a full step, or correct the rows that were computed."""
        if not full:
            for i in rows:
                held[i].refresh(fresh[i], self.weights)
            return
        older = [history.values for history in held] or [[torch.zeros_like(f)] * len(self.weights) for f in fresh]
        held[:] = [History([f, *kept][: len(self.weights)]) for f, kept in zip(fresh, older, strict=True)]

    def _dense(
        self, layer: torch.nn.Module, state: State, inputs: Tensor, rows: list[int], full: bool, counts: Counts
    ) -> Tensor:
        wanted = list(range(len(inputs))) if full else rows
        counts.ffn_rows += 0 if full else len(wanted)
        out = [history.guess(self.weights) for history in state.ffn] if not full else [torch.empty(0)] * len(inputs)
        for i in wanted:
            out[i] = layer(inputs[i])
        self._keep(state.ffn, out, wanted, full)
        return torch.stack(out)

    def _market(
        self, layer: Market, site: Site, inputs: Tensor, full: bool, counts: Counts
    ) -> tuple[Tensor, list[int]]:
        rule, tokens = self.rule, len(inputs)
        spot, price = layer.choose(inputs[None])
        routing = (spot[0].tolist(), price[0].tolist())
        values = sites.values_of(routing, tokens, rule.selector.score_weight)
        beta = rule.selector.beta if isinstance(rule.selector, ScoreThreshold) else 0.0
        sites.update_activation(site, routing[0], tokens, beta)

        def compute(e: int, token: int) -> Tensor:
            out: Tensor = layer.auction.bidders[e](inputs[token])
            return out

        if full:
            sites.fill(site, routing, values, compute, self.weights)
            recompute = [[True] * len(row) for row in routing[0]]
            out = torch.zeros_like(inputs)
            for e, row in enumerate(routing[0]):
                for p, token in enumerate(row):
                    out[token] += routing[1][e][p] * compute(e, token)
        else:
            recompute, margin = sites.decide(site, routing, tokens, rule)
            self.margin = min(self.margin, margin)
            held = [{slot.token for slot in row} for row in site.slots]
            counts.branches += sum(len(row) for row in routing[0])
            counts.matched += sum(token in held[e] for e, row in enumerate(routing[0]) for token in row)
            counts.recomputed += sum(sum(row) for row in recompute)
            out = sites.update(site, routing, values, recompute, compute, self.weights)
        pairs = [zip(row, again, strict=True) for row, again in zip(routing[0], recompute, strict=True)]
        refreshed = sorted({token for row in pairs for token, again in row if again})
        if layer.constant is None:
            return out, refreshed
        rows = {"inherit": refreshed, "reuse": [], "full": list(range(tokens))}[rule.shared_expert]
        wanted = list(range(tokens)) if full else rows
        counts.shared_rows += 0 if full else len(wanted)
        shared = [h.guess(self.weights) for h in site.shared] if not full else [torch.empty(0)] * tokens
        for i in wanted:
            shared[i] = layer.constant(inputs[i])
        self._keep(site.shared, shared, wanted, full)
        return out + torch.stack(shared), refreshed
