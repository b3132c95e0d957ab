"""What a step that is not full does: the level at which it reuses, what it recomputes, what a reused value is.

output     out = forecast(outputs of full steps)                              nothing in the network runs
blocks     x   = x_in + forecast(x_out - x_in of full steps)                  a stretch of blocks does not run
sublayer   f   = forecast(outputs of the sublayer before its gate)            selected token rows are recomputed
branch     h   = forecast(features of the expert), then summed with the       selected (token, expert) branches are
                 *current* routing weights                                    recomputed (MoECa)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from moeca_fx.errors import ConfigError
from moeca_fx.policies.checks import check_choice, check_integer, check_number
from moeca_fx.policies.predictor import Hold, Predictor
from moeca_fx.policies.selector import BranchPicker, BranchSelector, ScoreThreshold, TokenSelector

AttentionMode = Literal["synchronized", "reuse", "full"]
RowMode = Literal["inherit", "reuse", "full"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to take a step. `name` is the name of its graph."""

    level: ClassVar[str]
    name: str = "cached"
    predictor: Predictor = field(default_factory=Hold)

    def clock(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """The numbers that the graph reads at this step: the forecast's weights, then what the selector needs.

        Args:
            step: index of this step in its trajectory.
            full: indices of the full steps so far, the last one first.
        """
        return self.predictor.weights(step, full) if self.has_clock else ()

    @property
    def has_clock(self) -> bool:
        """Whether the graph needs a clock; a held value does not."""
        return not isinstance(self.predictor, Hold)


@dataclass(frozen=True, kw_only=True)
class OutputRule(Rule):
    """Forecast the model's output.

    Args:
        inputs: sum over the model's input too. The weights are then: outputs at the last full steps, the current
            input, inputs at those full steps. That covers every linear parametrisation (noise, data, velocity), in
            some of which the output of a stochastic sampler is smooth.
    """

    level: ClassVar[str] = "output"
    inputs: bool = False

    def __post_init__(self) -> None:
        if self.inputs and (self.predictor.terms < 3 or self.predictor.terms % 2 == 0):
            raise ConfigError(
                f"OutputRule.predictor: with inputs, expected 2n + 1 weights (n outputs, the input now, n inputs), "
                f"found {self.predictor.terms}"
            )

    @property
    def history(self) -> int:
        """How many full steps are remembered."""
        return (self.predictor.terms - 1) // 2 if self.inputs else self.predictor.terms

    @property
    def has_clock(self) -> bool:
        """See `Rule.has_clock`."""
        return self.inputs or not isinstance(self.predictor, Hold)


@dataclass(frozen=True, kw_only=True)
class BlocksRule(Rule):
    """Skip a stretch of blocks.

    Args:
        first, last: blocks at the beginning and at the end that run at every step.
        residual: forecast what the stretch adds to the token stream; else the stream after it.
    """

    level: ClassVar[str] = "blocks"
    first: int = 0
    last: int = 0
    residual: bool = True

    def __post_init__(self) -> None:
        check_integer(self, "first", 0)
        check_integer(self, "last", 0)


@dataclass(frozen=True, kw_only=True)
class SublayerRule(Rule):
    """Forecast the outputs of attention, feed-forward and MoE sublayers before their gates.

    Args:
        selector: picks the token rows of feed-forward and MoE sublayers that are computed; None picks none.
        attention: ``"reuse"`` or ``"full"``.
    """

    level: ClassVar[str] = "sublayer"
    selector: TokenSelector | None = None
    attention: Literal["reuse", "full"] = "reuse"

    def __post_init__(self) -> None:
        check_choice(self, "attention", ("reuse", "full"))

    def clock(self, step: int, full: Sequence[int]) -> tuple[float, ...]:
        """See `Rule.clock`."""
        selector = self.selector.clock(step, full) if self.selector is not None else ()
        return (*self.predictor.weights(step, full), *selector) if self.has_clock else ()

    @property
    def has_clock(self) -> bool:
        """See `Rule.has_clock`."""
        return self.selector is not None or not isinstance(self.predictor, Hold)


@dataclass(frozen=True, kw_only=True)
class BranchRule(Rule):
    """Forecast the features of expert branches; recompute new and selected ones (MoECa, method sections 2 to 4).

    Args:
        selector: picks the branches that are recomputed although the token's cache holds their expert.
        margin: a newly routed expert replaces the cached one only when its routing share exceeds the share that the
            cached branch had by more than this; None always replaces it.
        attention, dense_ffn, shared_expert: as in `MoECa`.
    """

    level: ClassVar[str] = "branch"
    selector: BranchSelector = field(default_factory=ScoreThreshold)
    margin: float | None = None
    attention: AttentionMode = "synchronized"
    dense_ffn: RowMode = "inherit"
    shared_expert: RowMode = "inherit"

    def __post_init__(self) -> None:
        check_choice(self, "attention", ("synchronized", "reuse", "full"))
        check_choice(self, "dense_ffn", ("inherit", "reuse", "full"))
        check_choice(self, "shared_expert", ("inherit", "reuse", "full"))
        if not isinstance(self.selector, ScoreThreshold | BranchPicker):
            raise ConfigError(
                "BranchRule.selector: expected a ScoreThreshold or a BranchPicker, found "
                f"{type(self.selector).__name__}; derive the selector from BranchPicker"
            )
        if "error" in self.selector.signals and self.predictor.terms < 2:
            raise ConfigError(
                "BranchRule.selector: 'error' is what a forecast missed, and this predictor holds its values; use "
                "Lagrange(1) or a higher order, or another signal"
            )
        if self.margin is not None:
            check_number(self, "margin", "None or a finite number >= 0")
