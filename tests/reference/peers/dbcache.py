"""First-block cache and DBCache: run the first blocks, and skip the middle when their residual hardly moved."""

from typing import Any

from torch import Tensor

from tests.reference.peers import network
from tests.reference.peers.base import FULL, Reference


class DBCache(Reference):
    """R = tokens after the first F blocks - embedded tokens; diff = mean |R_prev - R| / mean |R_prev|.

    diff < threshold: the cached residual of the middle blocks (F .. L - B - 1) is added and the last B blocks run on
    the sum. Else, and at the first step, everything is computed, and R_prev and the middle's residual are replaced:
    both belong to the last computed step. One decision for the whole batch.

    Args:
        model: the model.
        first: F, at least 1.
        last: B.
        threshold: compared with diff.
    """

    rule = "dbcache"

    def __init__(self, model: Any, first: int = 8, last: int = 0, threshold: float = 0.08) -> None:
        super().__init__(model)
        assert first >= 1 and last >= 0 and first + last <= len(model.blocks)
        self.first, self.end, self.threshold = first, len(model.blocks) - last, threshold
        self.first_residual: Tensor | None = None  # R of the last computed step, [B, T, H]
        self.middle_residual: Tensor | None = None  # [B, T, H]

    def step(self, j: int, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, str]:
        model, depth = self.model, len(self.model.blocks)
        condition = network.condition_of(model, t, y)
        tokens = network.embed(model, x)
        entered = network.run_blocks(model, tokens, condition, 0, self.first)
        residual = entered - tokens
        reuse = False
        if self.first_residual is not None:
            change = (self.first_residual - residual).abs().mean() / self.first_residual.abs().mean()
            self.decided(abs(float(change) - self.threshold))
            reuse = float(change) < self.threshold
        if reuse:
            assert self.middle_residual is not None
            left = entered + self.middle_residual
        else:
            left = network.run_blocks(model, entered, condition, self.first, self.end)
            self.first_residual, self.middle_residual = residual, left - entered
        hidden = network.run_blocks(model, left, condition, self.end, depth)
        return network.finish(model, hidden, condition), self.rule if reuse else FULL


class FirstBlockCache(DBCache):
    """DBCache with F = 1 and B = 0: the first block alone decides for all the others."""

    rule = "firstblockcache"

    def __init__(self, model: Any, threshold: float = 0.08) -> None:
        super().__init__(model, 1, 0, threshold)
