"""Site records: the places of a captured graph where something can be reused across steps.

Nodes are held by name, so that a record stays valid in every copy of the graph and prints as it is.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar

from moeca_fx.discover.records import Layout

Form = Literal["token", "empty", "expert"]
"""Tokens chose their experts; or so, and some slots are empty; or experts chose their tokens."""


@dataclass(frozen=True)
class AttentionSite:
    """Self-attention with the residual of one token stream that it answers.

    Attributes:
        path: module path, e.g. ``blocks.0.attn``.
        core: the scaled_dot_product_attention node; `query`, `key`, `value` feed it, laid out [B, h, T, d].
        output: its result [B, T, H] after the output projection and before the gate.
        gate: the adaLN gate multiplied onto `output`, if any.
        residual_in, residual_out: token stream [B, T, H] before and after the block's addition.
        tokens: T.
        refused: why rows cannot be recomputed alone; None when they can.
        joint: whether the core attends to tokens of other streams too; this stream's begin at `first_token`, None where
            that cannot be told.
    """

    path: str
    core: str
    query: str
    key: str
    value: str
    output: str
    gate: str | None
    residual_in: str
    residual_out: str
    tokens: int
    refused: str | None = None
    joint: bool = False
    first_token: int | None = None


@dataclass(frozen=True)
class MoESite:
    """Router, routed experts and shared expert of one MoE layer.

    Attributes:
        path: module path of the layer, e.g. ``blocks.1.mlp``.
        region: path and method that dispatches to the experts, e.g. ``blocks.1.mlp.experts.forward``.
        experts: the `moeca::experts` marker node, later the node that replaced it.
        x, expert, weight: the marker's operands: token rows, expert ids, routing weights.
        num_experts, top_k: E and k; under layout ``"expert"`` `top_k` is the capacity C, tokens an expert.
        router: the router's form, e.g. ``sigmoid, bias-corrected top-2, renormalised, scaled``.
        shared: output node of the shared expert, if any; `shared_root` is the tensor it is computed from.
        shared_path: its module path.
        output: the layer's result [B, T, H] before the gate.
        gate, residual_in, residual_out: as for attention; they are None where no residual addition was found.
        attention: path of the attention site whose residual output this layer reads; the two stay synchronized.
        tokens: T.
        not_synchronized: why refreshed tokens cannot be routed again alone; None when they can.
        feature: node with every branch's output [B*T*k, H], or [B*E*C, H]; empty before `vectorize_experts`.
        layout: who chooses; slots of a cache are [B, T, k] under ``"token"`` and hold experts, [B, E, C] under
            ``"expert"`` and hold tokens: then the operand `expert` is tokens too.
        empty_slots: whether an expert id may be E, no expert; weights of such slots are 0 after `vectorize_experts`.
    """

    path: str
    region: str
    experts: str
    x: str
    expert: str
    weight: str
    num_experts: int
    top_k: int
    router: str
    shared: str | None
    shared_root: str | None
    shared_path: str | None
    output: str
    gate: str | None
    residual_in: str
    residual_out: str
    attention: str | None
    tokens: int
    not_synchronized: str | None = None
    feature: str = ""
    layout: Layout = "token"
    empty_slots: bool = False

    @property
    def form(self) -> Form:
        """Which operations serve the site."""
        return "empty" if self.empty_slots else self.layout

    @property
    def slots(self) -> tuple[int, int]:
        """Shape of a sample's slots: (T, k) or (E, C)."""
        return (self.tokens if self.layout == "token" else self.num_experts, self.top_k)

    @property
    def branches(self) -> int:
        """Branches of a sample."""
        return self.slots[0] * self.slots[1]

    @property
    def held(self) -> str:
        """Kind of the state that says what each slot holds: ``"expert"``, or ``"token"`` where experts choose."""
        return "expert" if self.layout == "token" else "token"


@dataclass(frozen=True)
class DenseFFNSite:
    """A dense feed-forward with its residual; fields as for attention."""

    path: str
    output: str
    gate: str | None
    residual_in: str
    residual_out: str
    tokens: int


Site = AttentionSite | MoESite | DenseFFNSite
AnySite = TypeVar("AnySite", AttentionSite, MoESite, DenseFFNSite)


@dataclass(frozen=True)
class Sites:
    """All sites in the order in which the network runs them, and what was looked at and left."""

    ordered: tuple[Site, ...]
    left: tuple[tuple[str, str], ...] = ()

    @property
    def attention(self) -> tuple[AttentionSite, ...]:
        """Attention sites in network order."""
        return tuple(site for site in self.ordered if isinstance(site, AttentionSite))

    @property
    def moe(self) -> tuple[MoESite, ...]:
        """MoE sites in network order."""
        return tuple(site for site in self.ordered if isinstance(site, MoESite))

    @property
    def dense_ffn(self) -> tuple[DenseFFNSite, ...]:
        """Dense feed-forward sites in network order."""
        return tuple(site for site in self.ordered if isinstance(site, DenseFFNSite))


def kind_of(site: Site) -> str:
    """``"attention"``, ``"moe"`` or ``"dense_ffn"``."""
    return {AttentionSite: "attention", MoESite: "moe", DenseFFNSite: "dense_ffn"}[type(site)]
