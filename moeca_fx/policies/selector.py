"""Which: the token rows or expert branches that a step computes although it could reuse them.

A selector names a plain tensor function and its constant arguments; the function becomes one node of the step's graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from moeca_fx.policies.branch import EntropyNorm, ScoreWeight, pick_none, pick_share
from moeca_fx.policies.checks import check_choice, check_number

Signal = Literal["received", "age", "error"]
BranchSignal = Literal["expert", "score", "error"]


@dataclass(frozen=True)
class Place:
    """Where a sublayer stands: its block's index and the number of blocks, and its number of tokens."""

    block: int
    blocks: int
    tokens: int


class TokenSelector(ABC):
    """Picks token rows of feed-forward and MoE sublayers.

    Signals that it may ask for, each [B, T]: ``received``, how much attention a token got in the block's attention at
    the last full step (column sums of the head-averaged softmax map); ``age``, how often the token's row was reused
    since it was last computed, 0 right after; ``error``, the L2 norm of what a forecast would have missed at the last
    full step.
    """

    @property
    @abstractmethod
    def signals(self) -> tuple[Signal, ...]:
        """What `function` takes first, in order."""

    def clock(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """Numbers of this step that `function` takes as a tensor after the signals; always the same count."""
        return ()

    @property
    @abstractmethod
    def function(self) -> Callable[..., Tensor]:
        """``function(*signals, clock, *arguments) -> mask [B, T]``, at module level."""

    @abstractmethod
    def arguments(self, place: Place) -> tuple[Any, ...]:
        """Constant arguments for one sublayer.

        Raises:
            UnsupportedModelError: the model lacks what the selector needs, e.g. a token grid.
        """


class BranchSelector(ABC):
    """Picks branches whose expert the token's cache holds: MoECa's `ScoreThreshold`, or a `BranchPicker`."""

    score_weight: ScoreWeight = "share"

    @property
    @abstractmethod
    def signals(self) -> tuple[BranchSignal, ...]:
        """What it looks at; see `BranchPicker`."""


class BranchPicker(BranchSelector):
    """Picks them with one function over what each cache slot is worth; it takes the signals first, in order.

    Signals that it may ask for, each [B, T, k], an entry a slot: ``expert``, the expert that the slot holds; ``score``,
    MoECa's score (Eq. 9) with the weights `lambda1`, `lambda2` and the kind `score_weight`, minus infinity where the
    expert is not routed to any more; ``error``, the weighted L2 norm of what a forecast of the branch would have missed
    at the last full step (only with a predictor that forecasts).

    Where experts choose their tokens, slots are [B, E, C], and ``expert`` is the token that each holds.
    """

    lambda1: float = 1.1
    lambda2: float = 0.6

    @property
    @abstractmethod
    def function(self) -> Callable[..., Tensor]:
        """``function(*signals, *arguments) -> mask [B, T, k]`` of slots to recompute, at module level."""

    def arguments(self) -> tuple[Any, ...]:
        """Constant arguments."""
        return ()


@dataclass(frozen=True)
class ScoreThreshold(BranchSelector):
    """Recompute where the score exceeds the expert's threshold (Eq. 9 to 12); fields as in `MoECa`."""

    tau0: float = 0.8
    alpha: float = 0.6
    beta: float = 0.65
    lambda1: float = 1.1
    lambda2: float = 0.6
    score_weight: ScoreWeight = "share"
    entropy_norm: EntropyNorm = "log"

    def __post_init__(self) -> None:
        for name in ("tau0", "alpha", "beta", "lambda1", "lambda2"):
            check_number(self, name)

    @property
    def signals(self) -> tuple[BranchSignal, ...]:
        """See `BranchSelector.signals`."""
        return ("score",)


@dataclass(frozen=True)
class Unmatched(BranchPicker):
    """Recompute nothing that the cache holds."""

    @property
    def signals(self) -> tuple[BranchSignal, ...]:
        """See `BranchSelector.signals`."""
        return ("expert",)

    @property
    def function(self) -> Callable[..., Tensor]:
        """See `BranchPicker.function`."""
        return pick_none


@dataclass(frozen=True)
class Budget(BranchPicker):
    """Recompute the given share of each sample's branches, those with the highest rank first.

    Args:
        share: of all routed branches of a sample, in [0, 1]; branches that the cache lacks come on top.
        by: ``"score"`` (Eq. 9), or ``"error"``, the weighted L2 norm of what a forecast of the branch would have missed
            at the last full step.
        lambda1, lambda2, score_weight: of the score.
    """

    share: float = 0.1
    by: Literal["score", "error"] = "score"
    lambda1: float = 1.1
    lambda2: float = 0.6
    score_weight: ScoreWeight = "share"

    def __post_init__(self) -> None:
        check_number(self, "share", "a number in [0, 1]", upper=1.0 + 1e-12)
        check_choice(self, "by", ("score", "error"))
        check_choice(self, "score_weight", ("share", "raw"))
        for name in ("lambda1", "lambda2"):
            check_number(self, name)

    @property
    def signals(self) -> tuple[BranchSignal, ...]:
        """See `BranchSelector.signals`."""
        return (self.by,)

    @property
    def function(self) -> Callable[..., Tensor]:
        """See `BranchPicker.function`."""
        return pick_share

    def arguments(self) -> tuple[Any, ...]:
        """See `BranchPicker.arguments`."""
        return (self.share,)
