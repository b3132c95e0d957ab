"""One MoECa step of one transformer block for one sample, in plain Python.

full step                         cached step of a MoE block ("synchronized")
attention of every token          route with the cached attention: thresholds, decision
every branch, every shared row    refresh the attention rows of tokens with a recomputed branch
slots = the router's order        route again, decide again, compute what is left in R
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from tests.reference import blocks, moe_site
from tests.reference.moe_site import SiteState, Slot


class Config(Protocol):
    """The fields of a MoECa config that one step reads."""

    @property
    def tau0(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def lambda1(self) -> float: ...
    @property
    def lambda2(self) -> float: ...
    @property
    def score_weight(self) -> str: ...
    @property
    def entropy_norm(self) -> str: ...
    @property
    def attention(self) -> str: ...
    @property
    def dense_ffn(self) -> str: ...
    @property
    def shared_expert(self) -> str: ...


@dataclass
class Counts:
    """What one step did at one block, summed over the samples of the batch."""

    branches: int = 0
    matched: int = 0
    recomputed: int = 0
    attention_rows: int = 0
    shared_rows: int = 0
    ffn_rows: int = 0

    def add(self, other: "Counts") -> None:
        """Add another step's, sample's or block's counts to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class BlockState:
    """The cache of one block for one sample: attention with keys and values, and the MoE site or FFN rows."""

    attn: list[Tensor] = field(default_factory=list)  # [T] of [H]
    key: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, h, d]
    value: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, h, d]
    ffn: list[Tensor] = field(default_factory=list)  # [T] of [H]; dense blocks
    site: SiteState = field(default_factory=SiteState)  # MoE blocks


Routing = tuple[list[list[int]], list[list[float]]]  # experts [T][k], the router's weights [T][k]


class BlockStep:
    """One step of one block for one sample.

    Args:
        block: the model's block.
        state: its cache for this sample; read and written.
        condition: the sample's condition [H].
        config: the policy.
    """

    def __init__(self, block: nn.Module, state: BlockState, condition: Tensor, config: Config) -> None:
        self.block, self.state, self.config = block, state, config
        self.vectors = blocks.modulation(block, condition)
        self.parts = blocks.moe_parts(block)
        self.counts = Counts()
        self.margin = math.inf  # the smallest |s - tau| decided on: how far the step is from a tie

    def full(self, tokens: Tensor) -> Tensor:
        """Compute everything and overwrite the cache; tokens [T, H] -> [T, H]."""
        everyone = list(range(tokens.shape[0]))
        self.refresh_attention(tokens, everyone)
        tokens = self.after_attention(tokens)
        inputs = blocks.mlp_input(self.block, tokens, self.vectors)
        if self.parts is None:
            self.refresh_ffn(inputs, everyone)
            return self.after_ffn(tokens)
        experts, weights = self.parts.route(inputs)
        site = self.state.site
        if not site.activation:
            site.activation = [[0.0 for _ in everyone] for _ in self.parts.experts]
        site.activation = moe_site.update_activation(site.activation, experts, self.config.beta)
        site.slots = []
        for i in everyone:
            values = moe_site.score_values(weights[i], self.config.score_weight)
            features = [self.parts.expert(e, inputs[i]) for e in experts[i]]
            site.slots.append([Slot(*slot) for slot in zip(experts[i], values, features, strict=True)])
            self.counts.branches += len(experts[i])
            self.counts.recomputed += len(experts[i])
        self.refresh_shared(inputs, everyone)
        return self.after_moe(tokens, (experts, weights))

    def cached_moe(self, tokens: Tensor) -> tuple[Tensor, list[int]]:
        """A cached step of a MoE block; also returns the refresh set that later dense blocks inherit."""
        assert self.parts is not None
        site, config, everyone = self.state.site, self.config, list(range(tokens.shape[0]))
        if config.attention == "full":
            self.refresh_attention(tokens, everyone)
        moe_tokens = self.after_attention(tokens)
        inputs = blocks.mlp_input(self.block, moe_tokens, self.vectors)
        routing = self.parts.route(inputs)
        seen = moe_site.update_activation(site.activation, routing[0], config.beta)
        tau = moe_site.thresholds(seen, config.tau0, config.alpha, config.entropy_norm)
        recompute = self.decide(routing, tau)
        refresh = [i for i in everyone if any(recompute[i])]
        if config.attention == "synchronized":
            self.refresh_attention(tokens, refresh)
            moe_tokens = self.after_attention(tokens)
            inputs = blocks.mlp_input(self.block, moe_tokens, self.vectors)
            routing = self.parts.route(inputs)
            recompute = self.decide(routing, tau)  # the same thresholds, now on the final routing
        experts, weights = routing
        for i in everyone:
            held = [slot.expert for slot in site.slots[i]]
            computed = [
                self.parts.expert(e, inputs[i]) if again else None
                for e, again in zip(experts[i], recompute[i], strict=True)
            ]
            values = moe_site.score_values(weights[i], config.score_weight)
            site.slots[i] = moe_site.update_slots(site.slots[i], experts[i], values, computed)
            self.counts.branches += len(experts[i])
            self.counts.matched += sum(q is not None for q in moe_site.match(experts[i], held))
            self.counts.recomputed += sum(recompute[i])
        site.activation = moe_site.update_activation(site.activation, experts, config.beta)
        if config.shared_expert == "full":
            self.refresh_shared(inputs, everyone)
        elif config.shared_expert == "inherit":
            self.refresh_shared(inputs, [i for i in everyone if any(recompute[i])])
        return self.after_moe(moe_tokens, routing), refresh

    def cached_dense(self, tokens: Tensor, inherited: list[int]) -> Tensor:
        """A cached step of a dense block; `inherited` is the refresh set of the nearest earlier MoE block."""
        everyone = list(range(tokens.shape[0]))
        if self.config.attention == "full":
            self.refresh_attention(tokens, everyone)
        elif self.config.attention == "synchronized":
            rows = {"inherit": inherited, "reuse": [], "full": everyone}
            self.refresh_attention(tokens, rows[self.config.dense_ffn])
        tokens = self.after_attention(tokens)
        inputs = blocks.mlp_input(self.block, tokens, self.vectors)
        rows = {"inherit": inherited, "reuse": [], "full": everyone}
        self.refresh_ffn(inputs, rows[self.config.dense_ffn])
        return self.after_ffn(tokens)

    def decide(self, routing: Routing, tau: list[float]) -> list[list[bool]]:
        """The recomputation set R [T][k] for a routing."""
        config, decisions = self.config, []
        for experts, weights, slots in zip(*routing, self.state.site.slots, strict=True):
            values = moe_site.score_values(weights, config.score_weight)
            scores = moe_site.branch_scores(experts, values, slots, config.lambda1, config.lambda2)
            decisions.append(moe_site.decide(experts, scores, tau))
            for e, s in zip(experts, scores, strict=True):
                if s is not None:
                    self.margin = min(self.margin, abs(s - tau[e]))
        return decisions

    def refresh_attention(self, tokens: Tensor, rows: list[int]) -> None:
        """Project q, k, v of these rows anew, replace their keys and values, then their attention rows."""
        inputs = blocks.attention_input(self.block, tokens, self.vectors)
        query, key, value = blocks.queries_keys_values(self.block, inputs)
        state = self.state
        if not state.attn:
            state.attn = [torch.empty(0) for _ in tokens]
            state.key, state.value = torch.empty_like(key), torch.empty_like(value)
        for i in rows:
            state.key[i] = key[i]
            state.value[i] = value[i]
        for i in rows:
            state.attn[i] = blocks.attention_row(self.block, query[i], state.key, state.value)
        self.counts.attention_rows += len(rows)

    def refresh_ffn(self, inputs: Tensor, rows: list[int]) -> None:
        """Recompute the dense FFN of these rows."""
        if not self.state.ffn:
            self.state.ffn = [torch.empty(0) for _ in inputs]
        for i in rows:
            self.state.ffn[i] = blocks.dense_row(self.block, inputs[i])
        self.counts.ffn_rows += len(rows)

    def refresh_shared(self, inputs: Tensor, rows: list[int]) -> None:
        """Recompute the shared expert for these rows."""
        assert self.parts is not None
        if not self.state.site.shared:
            self.state.site.shared = [torch.empty(0) for _ in inputs]
        for i in rows:
            self.state.site.shared[i] = self.parts.shared_row(inputs[i])
        self.counts.shared_rows += len(rows)

    def after_attention(self, tokens: Tensor) -> Tensor:
        """The residual stream [T, H] after the (partly) cached attention, under the current gate."""
        return tokens + self.vectors.gate_attn * torch.stack(self.state.attn)

    def after_ffn(self, tokens: Tensor) -> Tensor:
        """The residual stream [T, H] after the dense FFN, under the current gate."""
        return tokens + self.vectors.gate_mlp * torch.stack(self.state.ffn)

    def after_moe(self, tokens: Tensor, routing: Routing) -> Tensor:
        """The residual stream [T, H] after the MoE layer: Eq. 8 plus the shared expert, then the gate."""
        rows = []
        for i, (experts, weights) in enumerate(zip(*routing, strict=True)):
            feature = {slot.expert: slot.feature for slot in self.state.site.slots[i]}
            routed = moe_site.combine(weights, [feature[e] for e in experts])
            rows.append(routed + self.state.site.shared[i])
        return tokens + self.vectors.gate_mlp * torch.stack(rows)
