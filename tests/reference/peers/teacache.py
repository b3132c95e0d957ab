"""TeaCache: the change of the first block's modulated input says when the stack may be skipped (arXiv 2411.19108)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference.peers import network
from tests.reference.peers.base import FULL, Reference, item0

EPSILON = 1e-6


def relative_change(now: Tensor, before: Tensor) -> float:
    """mean |now - before| / (mean |before| + 1e-6), over the whole batch."""
    return float((now - before).abs().mean() / (before.abs().mean() + EPSILON))


def polynomial(coefficients: Sequence[float], value: float) -> float:
    """Coefficients from the highest power to the constant, as TeaCache publishes them."""
    return sum(c * value**power for power, c in enumerate(reversed(coefficients)))


class TeaCache(Reference):
    """acc += p(change of m) at every step but the first and last; acc < threshold: add the residual of the whole stack.

    m is the first block's modulated input of the current step, compared with the step before, whatever that was.
    The first and the last step compute; a computed step sets acc to 0 and keeps the residual of the stack (output of
    the last block - embedded tokens). One decision for the whole batch.

    Args:
        model: the model.
        steps: of the whole trajectory.
        threshold: compared with acc.
        coefficients: of p, highest power first; None for the identity.
    """

    def __init__(
        self, model: Any, steps: int, threshold: float = 0.1, coefficients: Sequence[float] | None = None
    ) -> None:
        super().__init__(model)
        self.steps, self.threshold = steps, threshold
        self.coefficients = (1.0, 0.0) if coefficients is None else tuple(coefficients)
        self.accumulated = 0.0
        self.last_input: Tensor | None = None  # m of the step before, [B, T, H]
        self.residual: Tensor | None = None  # of the stack at the last computed step, [B, T, H]

    def step(self, j: int, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, str]:
        if j >= self.steps:
            raise ValueError(f"step {j} of a trajectory that was said to have {self.steps} steps")
        condition = network.condition_of(self.model, t, y)
        tokens = network.embed(self.model, x)
        modulated = modulated_input(self.model, tokens, condition)
        reuse = False
        if 0 < j < self.steps - 1:
            assert self.last_input is not None
            self.accumulated += polynomial(self.coefficients, relative_change(modulated, self.last_input))
            self.decided(abs(self.accumulated - self.threshold))
            reuse = self.accumulated < self.threshold
        self.last_input = modulated
        if reuse:
            assert self.residual is not None, "the first step computed"
            return network.finish(self.model, tokens + self.residual, condition), "teacache"
        hidden = network.run_blocks(self.model, tokens, condition, 0, len(self.model.blocks))
        self.residual, self.accumulated = hidden - tokens, 0.0
        return network.finish(self.model, hidden, condition), FULL


def modulated_input(model: Any, tokens: Tensor, condition: Tensor) -> Tensor:
    """m [B, T, H]: what the first block's attention sees."""
    block = model.blocks[0]
    return network.attention_input(block, tokens, network.modulation(block, condition))


def measured_changes(model: Any, trajectory: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[float, float]]:
    """(relative change of m, relative change of the prediction) from each step of an uncached run to the next."""
    changes: list[tuple[float, float]] = []
    before: tuple[Tensor, Tensor] | None = None
    with torch.no_grad():
        for x, t, y in trajectory:
            condition = network.condition_of(model, t, y)
            now = modulated_input(model, network.embed(model, x), condition), item0(model(x, t, y))
            if before is not None:
                changes.append((relative_change(now[0], before[0]), relative_change(now[1], before[1])))
            before = now
    return changes


def fit_coefficients(changes: Sequence[tuple[float, float]], degree: int = 4) -> list[float]:
    """The least-squares polynomial from input change to output change, coefficients from the highest power down."""
    rows = [[value**power for power in reversed(range(degree + 1))] for value, _ in changes]
    targets = [[output] for _, output in changes]
    solution = torch.linalg.lstsq(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64), driver="gelsd"
    ).solution
    return [float(c) for c in solution.flatten()]
