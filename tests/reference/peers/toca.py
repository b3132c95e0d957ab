"""ToCa: attention reused, the feed-forward recomputed for the tokens that matter most (arXiv 2410.05317)."""

from typing import Any

from torch import Tensor

from tests.reference.peers import network, token_scores
from tests.reference.peers.base import FULL
from tests.reference.peers.schedules import toca_full_steps
from tests.reference.peers.sublayers import SublayerReference


class ToCa(SublayerReference):
    """Full steps by `schedules.toca_full_steps`; a cached step reuses every attention output and, in every
    feed-forward (dense or mixture of experts, with its shared expert), recomputes int(r(l, s) * T) tokens.

    Decided where the description leaves room, as the published code has it: a token's age is how often its cached row
    was reused since it was last computed in that layer, so it is 0 at the first step after a full one, and steps that
    do not come to the layer (DuCa's aggressive ones) do not count. Recomputed rows replace the cached ones; everything
    is per sample; ties go to the lower token index.

    Args:
        model: the model.
        steps: T_s, of the whole trajectory.
        interval: N.
        fresh_ratio: base of the ratio, see `token_scores.fresh_ratio`.
        age_weight: of age / N in the score.
        bonus: share of its own score that the best token of each 2 x 2 block gets on top.
    """

    def __init__(
        self,
        model: Any,
        steps: int,
        interval: int = 4,
        fresh_ratio: float = 0.07,
        age_weight: float = 0.25,
        bonus: float = 0.6,
    ) -> None:
        super().__init__(model)
        self.steps, self.interval = steps, interval
        self.fresh_ratio, self.age_weight, self.bonus = fresh_ratio, age_weight, bonus
        self.schedule = toca_full_steps(steps, interval)
        self.j = 0
        self.cache: dict[tuple[int, str], Tensor] = {}  # [B, T, H]
        self.scores: dict[int, list[list[float]]] = {}  # layer -> [B][T], s1 at the last full step
        self.ages: dict[int, list[list[int]]] = {}  # layer -> [B][T], reuses since the row was computed

    def step(self, j: int, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, str]:
        self.begin(j)
        return self.predict(x, t, y), FULL if self.schedule[j] else "toca"

    def begin(self, j: int) -> None:
        """Step `j` begins."""
        if j >= self.steps:
            raise ValueError(f"step {j} of a trajectory that was said to have {self.steps} steps")
        self.j = j

    def attention(self, index: int, inputs: Tensor) -> Tensor:
        if self.schedule[self.j]:
            self.cache[index, "attention"] = network.attention(self.model.blocks[index], inputs)
            self.scores[index] = [self.attention_score(index, sample) for sample in inputs]
        return self.cache[index, "attention"]

    def attention_score(self, index: int, inputs: Tensor) -> list[float]:
        """s1 of every token, from one sample's attention inputs [T, H]."""
        return token_scores.attention_score(token_scores.attention_map(self.model.blocks[index], inputs))

    def ffn(self, index: int, inputs: Tensor) -> Tensor:
        batch, tokens, _ = inputs.shape
        block = self.model.blocks[index]
        if self.schedule[self.j]:
            self.cache[index, "ffn"] = network.ffn(block, inputs)
            self.ages[index] = [[0] * tokens for _ in range(batch)]
            return self.cache[index, "ffn"]
        output = self.cache[index, "ffn"].clone()
        for b in range(batch):
            rows = self.fresh_tokens(index, b)
            if rows:
                output[b, rows] = network.ffn(block, inputs[b : b + 1, rows])[0]
            ages = self.ages[index][b]
            self.ages[index][b] = [0 if token in rows else ages[token] + 1 for token in range(tokens)]
        self.cache[index, "ffn"] = output
        return output

    def fresh_tokens(self, index: int, b: int) -> list[int]:
        """The tokens of sample `b` that block `index` recomputes at this step."""
        s = self.steps - 1 - self.j
        ratio = token_scores.fresh_ratio(self.fresh_ratio, index, len(self.model.blocks), s, self.steps)
        scores = token_scores.with_age(self.scores[index][b], self.ages[index][b], self.age_weight, self.interval)
        scores, lead = token_scores.with_block_bonus(scores, self.bonus)
        rows, gap = token_scores.best_tokens(scores, token_scores.fresh_count(ratio, len(scores)))
        if 0 < len(rows) < len(scores):
            self.decided(min(lead, gap))
        if 0 < ratio < 1:  # a count next to an integer may be rounded to it
            self.decided(abs(ratio * len(scores) - round(ratio * len(scores))))
        return rows
