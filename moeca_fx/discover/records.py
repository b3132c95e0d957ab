"""What discovery returns."""

from dataclasses import dataclass, field
from typing import Literal

from moeca_fx.discover.inline.block import Block
from moeca_fx.discover.inline.stacked import StackedForm
from moeca_fx.reasons import Reason
from moeca_fx.registry.entry import Entry

Layout = Literal["token", "expert"]
"""Who chooses: each token its k experts (token choice), or each expert its C tokens (expert choice)."""


@dataclass(frozen=True)
class MoERegion:
    """A method of a module that is proven to compute ``sum_k weight_k * expert_k(x)``, or to hold that sum.

    Attributes:
        path: module path of the region's owner, e.g. ``blocks.1.mlp.experts``.
        method: the method that dispatches to the experts, e.g. ``forward``.
        block: smallest enclosing module that also holds the router's top-k, e.g. ``blocks.1.mlp``.
        experts: module path of each expert, by expert id; for stacked experts that of their module and a number.
        top_k: branches a token; tokens an expert takes of a sample (C) when the experts choose.
        x, expert, weight: parameter names of the method that carry the token rows, expert ids and routing weights;
            empty when the method routes too (`inline`).
        error: largest absolute difference of the proof, relative to the largest output.
        inline: whether the method holds router, dispatch and more; it is then replayed from a tape.
        container: module path of what holds the experts.
        form: what stacked experts compute; None for modules.
        keyword: parameter by which the experts take their rows; None by position.
        free: module path of experts without parameters (identity, zero) by their id; they are computed densely.
        layout: ``"token"``: ids and weights are [.., k] of the experts that each token chose. ``"expert"``: they are
            [B, E, C], and `expert` names the chosen *tokens*: int64, 0 <= token < T within the sample, distinct in a
            row; x is [B, T, H] or [B*T, H].
        empty_slots: whether an id may be E, which means no expert (threshold routing, dropped tokens, experts that
            compute nothing); of token layout alone.
        entry: the registered entry that says what the method computes; None where it was found out.
        replay: how the proof replayed a call of an inline region; None of others. On data a call's own is recorded.
        proven_on: of a model without weights, the layer that was filled with random numbers and proven; empty on data.
    """

    path: str
    method: str
    block: str
    experts: tuple[str, ...]
    top_k: int
    x: str
    expert: str
    weight: str
    error: float
    inline: bool = False
    container: str = ""
    form: StackedForm | None = None
    keyword: str | None = None
    free: tuple[tuple[int, str], ...] = ()
    layout: Layout = "token"
    empty_slots: bool = False
    entry: Entry | None = None
    replay: Block | None = field(default=None, compare=False, repr=False)
    proven_on: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        assert self.layout == "token" or not self.empty_slots, f"{self.path}: experts that choose fill their slots"

    @property
    def num_experts(self) -> int:
        """Number of routed experts E that have parameters."""
        return len(self.experts)


@dataclass(frozen=True)
class Refusal:
    """A candidate that is not rewritten.

    Attributes:
        path: module path of the candidate.
        reason: why, and what could be done.
        is_moe: whether it ran under a router (a top-k): then the model cannot be transformed without it.
        codes: the documented reason of every attempt; none repeats.
    """

    path: str
    reason: str
    is_moe: bool
    codes: tuple[Reason, ...] = ()

    @property
    def code(self) -> Reason | None:
        """The one that tells most."""
        return Reason.most_telling(self.codes)


@dataclass(frozen=True)
class Discovery:
    """Proven regions and refused candidates, in module order."""

    regions: tuple[MoERegion, ...]
    refused: tuple[Refusal, ...]
