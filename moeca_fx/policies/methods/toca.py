"""ToCa (arXiv 2410.05317): attention is held; feed-forward and MoE layers recompute the tokens that score highest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.policies.checks import check_integer, check_number
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.rules import SublayerRule
from moeca_fx.policies.schedule import FULL, Schedule
from moeca_fx.policies.selector import Place, Signal, TokenSelector

AGE_WEIGHT = 0.25


@dataclass(frozen=True)
class ToCaSchedule(Schedule):
    """Full at the first step and where ``s % c == 0`` before and after c is set anew, s counting down to 0.

    c is set anew at the first step and wherever ``s % c == 0``: 2 while s / steps is in [.2, .4), else
    ``round(interval / (1.4 - .8 s/steps))``. The published code tests in every block and sets c in the first one, so
    that a step which the new c does not divide is not full (250 steps, interval 4: 72 full steps).

    Args:
        rules: how many rules the steps in between take in turn: 1 (ToCa) or 2 (DuCa).
    """

    steps: int
    interval: int
    rules: int = 1

    def choose(self, step: int, change: float, memory: Any) -> tuple[int, Any]:
        """See `Schedule.choose`; the memory is (c, steps since the last full one)."""
        s = self.steps - 1 - step
        cycle, since = memory if memory is not None else (1, 0)
        if s % cycle == 0:
            cycle = self.cycle(s)
            if step == 0 or s % cycle == 0:
                return FULL, (cycle, 0)
        return since % self.rules, (cycle, since + 1)

    def cycle(self, s: int) -> int:
        """Length of the cycle that a full step at `s` begins."""
        if int(0.2 * self.steps) <= s < int(0.4 * self.steps):
            return 2
        return max(1, round(self.interval / (1.4 - 0.8 * s / self.steps)))

    @property
    def length(self) -> int:
        """`steps`."""
        return self.steps

    @property
    def settles(self) -> int:
        """A few cycles."""
        return min(self.steps, 4 * self.interval)


def top_tokens(received: Tensor, age: Tensor, clock: Tensor, layer_ratio: float, interval: int, bonus: float) -> Tensor:
    """The tokens to compute.

    Args:
        received, age: [B, T] signals.
        clock: [1] the part of the ratio that depends on the step.
        layer_ratio: the part that depends on the layer.
        interval: N, the unit of age.
        bonus: share of its score that the best token of each 2x2 block gets on top.

    Returns:
        [B, T] bool; ``floor(ratio * T)`` tokens a sample, the first of equals.
    """
    tokens = received.shape[1]
    score = received / received.norm(dim=1, keepdim=True).clamp_min(1e-12) + AGE_WEIGHT * age / interval
    side = math.isqrt(tokens)
    blocks = score.view(-1, side // 2, 2, side // 2, 2).permute(0, 1, 3, 2, 4).flatten(3)  # [B, S/2, S/2, 4]
    best = torch.nn.functional.one_hot(blocks.argmax(-1), 4).to(score.dtype)
    blocks = blocks * (1 + bonus * best)
    score = blocks.unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4).reshape(-1, tokens)
    count = torch.floor((layer_ratio * clock[0]).clamp(0, 1) * tokens)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    selected: Tensor = rank < count
    return selected


@dataclass(frozen=True)
class TopTokens(TokenSelector):
    """ToCa's ratio ``r(l, s) = fresh_ratio (1.8 - 1.6 l/(L-1)) (1.4 - .8 s/steps) 2.5`` and score."""

    steps: int
    interval: int
    fresh_ratio: float
    bonus: float

    @property
    def signals(self) -> tuple[Signal, ...]:
        """Attention received, and age."""
        return ("received", "age")

    def clock(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """The part of the ratio that depends on the step."""
        return (1.4 - 0.8 * (self.steps - 1 - step) / self.steps,)

    @property
    def function(self) -> Callable[..., Tensor]:
        """`top_tokens`."""
        return top_tokens

    def arguments(self, place: Place) -> tuple[Any, ...]:
        """Layer ratio, interval, bonus."""
        side = math.isqrt(place.tokens)
        if side * side != place.tokens or side % 2:
            raise UnsupportedModelError(
                f"ToCa's spatial score: expected a square token grid of even side, found {place.tokens} tokens; choose "
                "a policy without one, e.g. taylorseer"
            )
        depth = place.block / (place.blocks - 1) if place.blocks > 1 else 0.0
        return (self.fresh_ratio * (1.8 - 1.6 * depth) * 2.5, self.interval, self.bonus)


@dataclass(frozen=True)
class ToCa(Method):
    """Token-wise caching as published ("ddpm250" settings).

    Args:
        steps: length of the trajectory.
        interval: N of the schedule.
        fresh_ratio: mean share of tokens to compute, before its modulation by layer and step.
        bonus: of the best token in each 2x2 block.
    """

    method: ClassVar[str] = "toca"

    steps: int
    interval: int = 4
    fresh_ratio: float = 0.07
    bonus: float = 0.6

    def _check(self) -> None:
        check_integer(self, "steps", 1)
        check_integer(self, "interval", 1)
        check_number(self, "fresh_ratio")
        check_number(self, "bonus")

    def policy(self) -> Policy:
        """ToCa's schedule, held sublayers with selected rows computed."""
        selector = TopTokens(self.steps, self.interval, self.fresh_ratio, self.bonus)
        return Policy(ToCaSchedule(self.steps, self.interval), (SublayerRule(selector=selector),))
